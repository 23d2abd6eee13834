"""What methods for fewer vision tokens cost, and what they give for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from zoo.plot import COLOURS, FAINT, GRID, INK, MARKERS


def tokens_figure(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Agreement with the full model, and accuracy where there is one, against FLOPs and against the
    time to the first token, both as shares of the full model's; a line for each method.

    Args:
      rows: as `zoo.train.bench.tokens.bench` returns them; those that failed are left out, as is
        what was not measured of the full model.
      title: of what.
    """
    fine = [row for row in rows if not row["error"]]
    full = next((row for row in fine if row["method"] == "full"), None)
    if full is None:
        raise ValueError("rows: want one of the method 'full', which the others are compared with")
    gains = {"top1_agreement": "same next token (%)", "accuracy": "right answers (%)"}
    gains = {key: label for key, label in gains.items() if full[key] is not None}
    prices = {"prefill_flops": "FLOPs of the prompt (%)", "ttft_s": "time to first token (%)"}
    prices = {key: label for key, label in prices.items() if full[key] is not None}
    figure = Figure(figsize=(2.4 + 3.6 * len(prices), 1.2 + 3.2 * len(gains)), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, x=0.02, ha="left")
    grid = figure.subplots(len(gains), len(prices), squeeze=False)
    methods = sorted({row["method"] for row in fine} - {"full"})
    for line, (gain, up) in zip(grid, gains.items(), strict=True):
        for axes, (price, along) in zip(line, prices.items(), strict=True):
            for number, method in enumerate(methods):
                points = sorted(
                    (100 * row[price] / full[price], 100 * row[gain])
                    for row in fine
                    if row["method"] == method
                )
                style = {
                    "color": COLOURS[number % len(COLOURS)],
                    "marker": MARKERS[number // len(COLOURS) % len(MARKERS)],
                }
                axes.plot(*zip(*points, strict=True), label=method, markersize=5, **style)
            axes.axhline(100 * full[gain], color=FAINT, linewidth=1, linestyle=":")
            axes.set_xlabel(along, fontsize=10, color=INK)
            axes.set_ylabel(up, fontsize=10, color=INK)
            axes.grid(color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=9, colors=INK, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        options = {"frameon": False, "fontsize": 9, "labelcolor": INK}
        figure.legend(handles, labels, loc="outside right center", **options)
    return figure
