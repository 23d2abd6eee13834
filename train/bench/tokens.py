"""Methods for fewer vision tokens side by side: the same weights, inputs and machine.

    zoo bench tokens --model runs/quickstart --methods all --keep 8,4,2 --data digits_vqa

Every method is run at every budget, and the full model first. Counted are vision tokens per layer,
FLOPs and bytes of the cache; measured are the time to the first token of a batch, tokens per second
while decoding, and the memory of the compiled program; compared with the full model are the next
token after every prompt and its distribution, and answers with those expected where data has some.

The folder gets `tokens.json`, `tokens.csv`, `tokens.md` and `tokens.png`. What is there already is
not measured again. A method that fails is listed with its error, and tried again the next time.
"""

import argparse
import csv
import functools
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.costing import cost
from zoo.generate.text import whole
from zoo.loaded import Loaded
from zoo.models.core.compiled import quick_options
from zoo.models.core.errors import UsageError
from zoo.models.core.types import IMAGE, Array, Batch, Reserve
from zoo.train.bench.pages import table
from zoo.train.bench.prompts import Asked, as_keeps, as_methods, made_up, opened, questions
from zoo.whole import write_atomically

FULL = "full"
COLUMNS = (
    "method",
    "keep",
    "tokens_per_layer",
    "prefill_flops",
    "decode_flops",
    "kv_bytes",
    "ttft_s",
    "tokens_per_s",
    "peak_bytes",
    "top1_agreement",
    "kl",
    "accuracy",
    "error",
)
RESULTS, TABLE, PAGE, PLOT = "tokens.json", "tokens.csv", "tokens.md", "tokens.png"
DEFAULT_KEEP = "0.5,0.25,0.125"

Row = dict[str, Any]
"""What was found of one method at one budget, by `COLUMNS`; all but the first two None where it
failed, with the `error`.
"""

_ANSWER_TOKENS = 8


class Reading(NamedTuple):
    """What reading the prompts has shown: log probabilities [n, V] of the token after each, and the
    seconds of a batch.
    """

    logp: np.ndarray
    seconds: float


def bench(
    loaded: Loaded,
    asked: Sequence[Asked],
    methods: Sequence[str],
    keeps: Sequence[int | float],
    *,
    out: Path | None = None,
    runs: int = 3,
    decode: int = 8,
    facts: dict[str, Any] | None = None,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure methods at budgets, and the full model.

    Args:
      loaded: the model.
      asked: batches of prompts, all of one shape.
      methods: names that `reducer=` takes.
      keeps: budgets of each.
      out: a folder, for results that outlast an interruption.
      runs: how often each is timed; the median counts.
      decode: tokens that decoding is timed with.
      facts: what the results depend on beside these, such as the model's name.
      tell: is called with every row as it is done.

    Raises:
      UsageError: no prompts, or the folder has results of other settings.
    """
    if not asked or runs < 1 or decode < 1:
        raise UsageError("want prompts, and runs and decoded tokens, 1 or more of each")
    shape = {name: list(np.shape(array)) for name, array in asked[0].batch.items()}
    facts = {**(facts or {}), "batches": len(asked), "inputs": shape, "decode": decode}
    rows = _read(out, facts)
    done = {(row["method"], row["keep"]): row for row in rows if not row["error"]}
    wanted: list[tuple[str, int | float | None]] = [(FULL, None)]
    wanted += [(method, keep) for method in methods for keep in keeps]
    others = [row for row in rows if (row["method"], row["keep"]) not in wanted]
    reference: Reading | None = None
    found: list[Row] = []
    for method, keep in wanted:
        if (row := done.get((method, keep))) is None:
            if reference is None:
                plain = loaded.with_(reducer=None)
                reference, program = _prefilled(plain, asked, runs, decode)
            if method == FULL:
                row = _measured(plain, asked, reference, reference, program, runs, decode)
            else:
                row = _tried(loaded, method, keep, asked, reference, runs, decode)
            row = {name: {"method": method, "keep": keep, **row}.get(name) for name in COLUMNS}
        found.append(row)
        _write(out, facts, [*found, *others])
        tell(row)
    return found


def _tried(
    loaded: Loaded,
    method: str,
    keep: int | float | None,
    asked: Sequence[Asked],
    reference: Reading,
    runs: int,
    decode: int,
) -> Row:
    """A method at a budget, or the error that it ends with."""
    try:
        model = loaded.with_(reducer=method, keep=keep)
        reading, program = _prefilled(model, asked, runs, decode)
        return _measured(model, asked, reading, reference, program, runs, decode)
    except Exception as error:  # whatever it is, the other methods are measured
        return {"error": f"{type(error).__name__}: {error}"}


def _prefilled(
    model: Loaded, asked: Sequence[Asked], runs: int, decode: int
) -> tuple[Reading, Any]:
    """All prompts read, and the compiled program."""
    reader, _ = model.reader()

    def read(params: Any, batch: Batch) -> tuple[Array, Any]:
        return reader.prefill(params, batch, None, max(decode, _ANSWER_TOKENS))

    batches = [_given(each) for each in asked]
    program = jax.jit(read).lower(model.params, batches[0]).compile()
    logp = []
    for each, batch in zip(asked, batches, strict=True):
        logits, _ = program(model.params, batch)
        logp.append(np.asarray(jax.nn.log_softmax(logits))[each.valid])
    times = [_seconds(program, model.params, batches[0]) for _ in range(runs)]
    return Reading(np.concatenate(logp), statistics.median(times)), program


def _measured(
    model: Loaded,
    asked: Sequence[Asked],
    reading: Reading,
    reference: Reading,
    program: Any,
    runs: int,
    decode: int,
) -> Row:
    """The figures of a model whose prompts are read."""
    batch = _given(asked[0])
    step = _stepping(model, program, batch)
    rows = len(batch["ids"])
    one = {n: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for n, x in batch.items()}
    counted = cost(model.config, inputs=one, dtype="float32")
    memory = program.memory_analysis()
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    expected = np.exp(reference.logp)
    return {
        "tokens_per_layer": tokens_per_layer(model, batch),
        "prefill_flops": counted.flops["prefill"].total,
        "decode_flops": counted.flops["decode_step"].total,
        "kv_bytes": counted.kv_bytes["total"],
        "ttft_s": reading.seconds,
        "tokens_per_s": rows * decode / _decoding(model, program, step, batch, runs, decode),
        "peak_bytes": sum(getattr(memory, part, 0) for part in parts),
        "top1_agreement": float(np.mean(reading.logp.argmax(-1) == reference.logp.argmax(-1))),
        "kl": float(np.mean(np.sum(expected * (reference.logp - reading.logp), -1))),
        "accuracy": _accuracy(model, program, step, asked),
    }


def tokens_per_layer(model: Loaded, batch: Batch) -> list[float]:
    """The vision tokens that every layer of the decoder runs, on the mean of a batch."""

    @functools.partial(jax.jit, compiler_options=quick_options())
    def count(params: Any, batch: Batch) -> Any:
        return model.model.apply({"params": params}, batch, method=_counts)

    first, reports = count(model.params, batch)
    layers, here = [], float(first)
    for report in reports:
        runs = here
        if "kept_cells" in report:
            runs = float(report["kept_cells"])
        elif "left_cells" in report:
            runs = here = float(report["left_cells"])
        layers.append(runs)
    return layers


def _counts(module: Any, batch: Batch) -> tuple[Array, list[dict[str, Array]]]:
    """How many vision tokens enter the decoder, and what its layers report of them."""
    stream, memory = module.stream(batch, None)
    tokens = stream.tokens
    first = (tokens.valid & (tokens.modality == IMAGE)).sum(-1).mean()
    _, _, aux = module.decoder.run(stream, Reserve(), memory)
    names = ("kept_cells", "left_cells")
    return first, [{n: (r[n] >= 0).sum(-1).mean() for n in names if n in r} for r in aux]


def _stepping(model: Loaded, program: Any, batch: Batch) -> Any:
    """The compiled program of one more token, from parameters, ids [B, 1] and a cache."""
    reader, _ = model.reader()
    _, cache = program(model.params, batch)
    ids = jax.ShapeDtypeStruct((len(batch["ids"]), 1), jnp.int32)
    return jax.jit(reader.decode).lower(model.params, ids, cache).compile()


def _decoding(
    model: Loaded, program: Any, step: Any, batch: Batch, runs: int, decode: int
) -> float:
    """The seconds of decoding so many tokens."""
    ids = jnp.zeros((len(batch["ids"]), 1), jnp.int32)
    _, cache = program(model.params, batch)

    def write() -> float:
        state, begin = cache, time.perf_counter()
        for _ in range(decode):
            logits, state = step(model.params, ids, state)
        logits.block_until_ready()
        return time.perf_counter() - begin

    write()
    return statistics.median(write() for _ in range(runs))


def _accuracy(model: Loaded, program: Any, step: Any, asked: Sequence[Asked]) -> float | None:
    """The share of answers that are as expected; None where nothing is."""
    right: list[bool] = []
    for each in asked:
        if not any(each.answers):
            continue
        said = _answers(model, program, step, _given(each))
        pairs = zip(said, each.answers, each.valid, strict=True)
        right += [answer == want for answer, want, valid in pairs if valid]
    return sum(right) / len(right) if right else None


def _answers(model: Loaded, program: Any, step: Any, batch: Batch) -> list[str]:
    """What the model says first, the most likely tokens: `Loaded.answers` by programs at hand."""
    logits, cache = program(model.params, batch)
    said = []
    for _ in range(_ANSWER_TOKENS):
        said.append(logits.argmax(-1)[:, None].astype(jnp.int32))
        logits, cache = step(model.params, said[-1], cache)
    decode = model.speaker.decode
    return [whole(row, decode).strip() for row in np.concatenate(said, 1).tolist()]


def _given(asked: Asked) -> dict[str, Any]:
    """What the model reads of a batch."""
    left_out = ("labels", "segments")
    return {name: jnp.asarray(x) for name, x in asked.batch.items() if name not in left_out}


def _seconds(program: Any, *args: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - begin


# ------------------------------------------------------------------ files


def _read(out: Path | None, facts: dict[str, Any]) -> list[Row]:
    """The rows that an earlier run has written."""
    if out is None or not (out / RESULTS).exists():
        return []
    stored = json.loads((out / RESULTS).read_text("utf-8"))
    if stored["facts"] != json.loads(json.dumps(facts)):
        raise UsageError(
            f"{out / RESULTS} has results of other settings, {stored['facts']}: want the same, or "
            "another --out"
        )
    rows: list[Row] = stored["rows"]
    return rows


def _write(out: Path | None, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write what there is so far."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / RESULTS, json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        layers = " ".join(f"{n:g}" for n in row["tokens_per_layer"] or ())
        writer.writerow({**row, "tokens_per_layer": layers})
    write_atomically(out / TABLE, text.getvalue())
    write_atomically(out / PAGE, table(rows))


def main(argv: Sequence[str]) -> int:
    """Run `zoo bench tokens`; prints a table, or with `--json` a list of objects.

    Raises:
      UsageError: as `bench`, or flags that do not fit.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    args = _parser().parse_args(argv)
    methods, keeps = as_methods(args.methods), as_keeps(args.keep)
    loaded = opened(args.model)
    if args.data:
        asked = questions(loaded, args.data, batch=args.batch, limit=args.questions)
    else:
        asked = made_up(loaded, batch=args.batch)
    facts = {"model": args.model, "data": args.data, "questions": args.questions}
    if not args.json:
        print(HEADER)

    def tell(row: Row) -> None:
        if not args.json:
            print(line(row), flush=True)

    rows = bench(
        loaded, asked, methods, keeps, out=args.out, runs=args.runs, facts=facts, tell=tell
    )
    if args.json:
        print(json.dumps(rows, indent=2))
    if args.out:
        from zoo.plot import save
        from zoo.train.bench.plots import tokens_figure

        title = f"{args.model}, {jax.devices()[0].device_kind}"
        save(tokens_figure(rows, title=title), args.out / PLOT)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo bench tokens", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a checkpoint, or a name: random")
    parser.add_argument("--methods", default="all", help="names, with commas (%(default)s)")
    parser.add_argument(
        "--keep", default=DEFAULT_KEEP, help="tokens or shares, with commas (%(default)s)"
    )
    parser.add_argument("--data", metavar="NAME", help="an experiment, asked its questions")
    parser.add_argument("--questions", type=int, metavar="N", help="the first N of them")
    parser.add_argument("--batch", type=int, default=8, help="prompts at once (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of which the median counts")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results; continued")
    return parser


HEADER = (
    f"{'method':<22}{'keep':>7}{'tokens':>9}{'prefill':>12}{'cache':>12}{'first':>10}"
    f"{'tokens/s':>10}{'memory':>12}{'agree':>8}{'KL':>9}{'right':>8}"
)


def line(row: Row) -> str:
    """A row of the table for people."""
    keep = "" if row["keep"] is None else f"{row['keep']:g}"
    start = f"{row['method']:<22}{keep:>7}"
    if row["error"]:
        return f"{start}  failed: {row['error'].splitlines()[0]}"
    layers = row["tokens_per_layer"]
    right = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
    return (
        f"{start}{statistics.mean(layers):>9.1f}{row['prefill_flops'] / 1e9:>10.3f} G"
        f"{row['kv_bytes'] / 1024:>8.0f} KiB{1e3 * row['ttft_s']:>7.1f} ms"
        f"{row['tokens_per_s']:>10.1f}{row['peak_bytes'] / 2**20:>8.1f} MiB"
        f"{row['top1_agreement']:>8.1%}{row['kl']:>9.4f}{right:>8}"
    )
