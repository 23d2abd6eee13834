"""What the benchmarks share: contestants that take turns, and what they ran on."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

import zoo

Runs = dict[str, Callable[[], float]]
"""Every contestant, as a function that runs once and returns the seconds that it took."""


def take_turns(runs: Runs, rounds: int) -> dict[str, dict[str, float]]:
    """The fastest and the median seconds of each in `rounds` turns: `seconds`, `median_seconds`."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles, warms up
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return {
        "seconds": {name: min(times) for name, times in seconds.items()},
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
    }


def compare(runs: Runs, rounds: int) -> dict[str, Any]:
    """What `take_turns` finds, and how many times faster "zoo" is than each of the others."""
    found = take_turns(runs, rounds)
    best = found["seconds"]
    ratios = {name: round(best[name] / best["zoo"], 2) for name in runs if name != "zoo"}
    return {**found, "times_faster_than": ratios}


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """`run` as one of `Runs`."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    return once


def machine(*modules: ModuleType) -> dict[str, Any]:
    """The processor, its cores, and the versions of Python and of some modules."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
    }


def report(found: dict[str, Any], out: Path | None) -> None:
    """Print what came out, and write it to the file `out`."""
    text = json.dumps(found, indent=2) + "\n"
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")


def report_run(model: str, measure: Callable[[Any], dict[str, Any]], about: str) -> int:
    """The command of a script that measures a trained run: `RUN [--out FILE]`. Beside the figures
    stands the curve that the run has logged.

    Args:
      model: the name of the configuration that was trained.
      measure: from the loaded run to its figures.
      about: the script's docstring.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trained = json.loads((args.run / "config.json").read_text("utf-8"))
    facts = {"model": model, "seed": trained["seed"], "steps": trained["steps"]}
    report({**facts, **measure(zoo.load(str(args.run))), "curve": curve(args.run)}, args.out)
    return 0


def curve(run: Path) -> dict[str, dict[str, float]]:
    """{what: {step: value}} of the loss in training and of the accuracy in evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    named = {"loss": "loss", "validation_accuracy": "eval/accuracy"}
    return {
        name: {str(row["step"]): round(row[key], 4) for row in rows if key in row}
        for name, key in named.items()
    }


def _cpu_name() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
