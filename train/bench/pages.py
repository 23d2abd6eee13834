"""A comparison of methods for fewer vision tokens as a table in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_SHARES = {"accuracy": "right", "top1_agreement": "agrees"}


def table(rows: Sequence[Row]) -> str:
    """A line for each method, and for each budget: right answers where data has some, agreement
    with the full model's next token, and FLOPs of the prompt beside the full model's, in per cent.

    Args:
      rows: as `zoo.train.bench.tokens.bench` returns them. A method's failures stand below.
    """
    full = next((row for row in rows if row["method"] == "full" and not row["error"]), None)
    if full is None:
        return "The full model has not been measured.\n"
    judged = {key: name for key, name in _SHARES.items() if full[key] is not None}
    keeps = list(dict.fromkeys(row["keep"] for row in rows if row["keep"] is not None))
    found = {(row["method"], row["keep"]): row for row in rows}
    names = [*judged.values(), "FLOPs"]
    head = ["method", *(f"{keep:g}: {name}" for keep in keeps for name in names)]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for method in dict.fromkeys(row["method"] for row in rows if row["keep"] is not None):
        cells = [method]
        for keep in keeps:
            row = found.get((method, keep))
            fine = row is not None and not row["error"]
            cells += _cells(row, full, judged) if row and fine else [""] * len(names)
        lines.append(_line(cells))
    whole = ", ".join(f"{100 * full[key]:.1f} % {name}" for key, name in judged.items())
    failed = [row for row in rows if row["error"]]
    reasons = dict.fromkeys(f"- {row['method']}: {row['error'].splitlines()[0]}" for row in failed)
    below = ["", "Without these figures:", "", *reasons] if reasons else []
    return "\n".join([f"The full model: {whole}.", "", *lines, *below]) + "\n"


def _cells(row: Row, full: Row, judged: Mapping[str, str]) -> list[str]:
    shares = [f"{100 * row[key]:.1f}" for key in judged]
    return [*shares, f"{100 * row['prefill_flops'] / full['prefill_flops']:.1f}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
