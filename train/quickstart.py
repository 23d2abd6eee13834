"""`zoo quickstart`: train a small model on real scans, judge its answers, and show both.

The run folder is that of any training (see `zoo.train.folder`) with, at the end,

    results.json             accuracy by number of vision tokens, over all and by kind of question;
                             what the decoder costs at each, beside the plain model's;
                             `seconds` are those of the sitting that finished it
    accuracy.png             the same as curves
    answers.png, sample.png  questions with the answers; a picture to try `zoo generate` on
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image
from rich.console import Console
from rich.table import Table

from zoo.cache import cache_folder
from zoo.costing import cost
from zoo.images import read_image
from zoo.loading import Loaded, load
from zoo.models.core.registry import registered
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.plot import Sample, accuracy_figure, answers_figure, save
from zoo.processors.chat import prompt
from zoo.train.config import Experiment
from zoo.train.data.pipeline import Questions
from zoo.train.folder import writing
from zoo.train.loop import train
from zoo.train.progress import Bar
from zoo.whole import write_atomically

BUDGETS = (1, 2, 4, 8, 16)
"""Numbers of vision tokens at which answers are judged."""

RESULTS, ACCURACY, ANSWERS, SAMPLE = "results.json", "accuracy.png", "answers.png", "sample.png"

_QUESTIONS_AT_ONCE = 100
_ANSWER_TOKENS = 8
_SHOWN_PER_KIND = 2


@dataclass(frozen=True)
class Answered:
    """One question with what was answered.

    Attributes:
      name: of the record that it is about.
      image: the picture, as `zoo.images.read_image` takes it.
      kind, question, expected: as in the data set.
      answers: what was generated, by number of vision tokens.
    """

    name: str
    image: Any
    kind: str
    question: str
    expected: str
    answers: Mapping[int, str]


@dataclass(frozen=True)
class Outcome:
    """What has become of a quickstart.

    Attributes:
      folder: of the run.
      step: training steps done.
      results: what `results.json` holds; None if the training was stopped before its end.
      status: of the process, 0 or 128 + the signal that stopped it.
      was_complete: whether there was nothing left to do.
    """

    folder: Path
    step: int
    results: Mapping[str, Any] | None
    status: int = 0
    was_complete: bool = False


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns 0, or 128 + n if signal n ended the training early.

    Raises:
      UsageError, ZooError: as `zoo.train.loop.train`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    args = _parser().parse_args(argv)
    experiment = importlib.import_module("zoo.configs.digits_vqa").config()
    if args.steps is not None:
        experiment = with_steps(experiment, args.steps)
    if args.seed is not None:
        experiment = replace(experiment, seed=args.seed)
    _one_device_per_core(experiment.batch_size)
    outcome = quickstart(experiment, args.out)
    if args.json:
        facts = {
            "out": str(outcome.folder),
            "complete": outcome.results is not None,
            "step": outcome.step,
        }
        print(json.dumps({**facts, **(outcome.results or {})}, indent=2))
    elif outcome.results is not None:
        show(outcome)
    return outcome.status


def with_steps(experiment: Experiment, steps: int) -> Experiment:
    """The experiment with so many steps, of which at most a tenth warm up."""
    warmup = min(experiment.optim.warmup, steps // 10)
    return replace(experiment, steps=steps, optim=replace(experiment.optim, warmup=warmup))


def quickstart(
    experiment: Experiment, out: str | Path, *, data_dir: str | Path | None = None
) -> Outcome:
    """Train, judge the answers to held-out questions and draw; what is there already is kept.

    Args:
      experiment: its data set has a validation split with questions of several kinds.
      out: the folder of the run.
      data_dir: where data sets are prepared; a folder in the user's cache by default.

    Raises:
      UsageError, ZooError: as `zoo.train.loop.train`.
    """
    began = time.monotonic()
    data_dir = cache_folder() / "data" if data_dir is None else data_dir
    with Bar() as bar:
        run = train(experiment, out, data_dir=data_dir, progress=bar)
        if run.stopped or not run.complete:
            return Outcome(run.folder, run.step, None, 128 + run.stopped if run.stopped else 0)
        if (results := _finished(run.folder, run.step)) is not None:
            return Outcome(run.folder, run.step, results, was_complete=True)
        loaded = load(run.folder)
        answered = ask(loaded, experiment, data_dir, bar)
        shares, samples = accuracies(answered), _samples(answered)
        _draw(run.folder, shares, samples, bar)
        budgets = list(answered[0].answers)
        ends = sorted({budgets[0], budgets[-1]})  # what lies between takes seconds to count, too
        found = costs(experiment.model, ends, _longest_prompt(loaded, experiment))
    results = {
        **shares,
        "cost": found,
        "questions": len(answered),
        "seconds": round(time.monotonic() - began, 1),
        "model": _model_name(experiment),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
        "seed": experiment.seed,
        "steps": run.step,
        "sample": {"image": SAMPLE, "prompt": samples[0].question},
    }
    with writing(run.folder):
        write_atomically(run.folder / RESULTS, json.dumps(results, indent=2) + "\n")
    return Outcome(run.folder, run.step, results)


def ask(loaded: Loaded, experiment: Experiment, data_dir: str | Path, bar: Bar) -> list[Answered]:
    """Let the model answer every question of the validation split at every budget that it has.

    Args:
      loaded: the model.
      experiment: whose data set is asked about; its model says how many vision tokens there are.
      data_dir: where the data set is prepared.
      bar: shows how far it is.
    """
    model: Any = experiment.model
    most = model.connector.num_tokens(model.tower.grid)
    budgets = [budget for budget in BUDGETS if budget <= most]
    processor = replace(loaded.processor, max_length=_longest_prompt(loaded, experiment))
    questions = Questions(experiment.data, processor, _QUESTIONS_AT_ONCE, data_dir)
    source = experiment.data.source("validation", data_dir)
    bar.phase("judging answers", sum(len(source[i]["kinds"]) for i in range(len(source))))
    answered: list[Answered] = []
    for asked in questions:
        # The number of vision tokens is data: one program answers for all of them.
        answers = {
            budget: loaded.answers(
                asked.batch, budget=jnp.int32(budget), max_new_tokens=_ANSWER_TOKENS
            )
            for budget in budgets
        }
        answered += [
            Answered(
                asked.names[row],
                asked.images[row],
                asked.kinds[row],
                asked.questions[row],
                asked.answers[row],
                {budget: answers[budget][row] for budget in budgets},
            )
            for row in asked.valid.nonzero()[0]
        ]
        right = accuracies(answered)["accuracy"][str(budgets[-1])]
        bar.update(len(answered), right=f"{right:.1%}")
    return answered


def accuracies(answered: Sequence[Answered]) -> dict[str, Any]:
    """Share of answers that are exactly the expected ones.

    Returns:
      `accuracy` {budget: share} and `by_kind` {kind: {budget: share}}, budgets as text, which is
      what JSON makes of them.
    """

    def shares(some: Sequence[Answered]) -> dict[str, float]:
        return {
            str(budget): sum(a.answers[budget] == a.expected for a in some) / len(some)
            for budget in some[0].answers
        }

    kinds = sorted({a.kind for a in answered})
    by_kind = {kind: shares([a for a in answered if a.kind == kind]) for kind in kinds}
    return {"accuracy": shares(answered), "by_kind": by_kind}


def costs(model: Any, budgets: Sequence[int], text_tokens: int) -> dict[str, dict[str, int]]:
    """What answering one question costs the decoder, counted from shapes in float32.

    Args:
      model: configuration with a connector and policies.
      budgets: numbers of vision tokens.
      text_tokens: of the question.

    Returns:
      {budget as text: `flops` of reading the prompt, `kv_bytes` that the layers keep of it}, and
      the same for "dense", the model without policies whose decoder sees every patch.
    """

    def of(config: Any, budget: int | None) -> dict[str, int]:
        found = cost(config, text_tokens=text_tokens, dtype="float32", budget=budget)
        return {"flops": found.flops["prefill"].total, "kv_bytes": found.kv_bytes["total"]}

    dense = replace(model, connector=MLPConnector(), policies=())
    return {"dense": of(dense, None)} | {str(budget): of(model, budget) for budget in budgets}


def show(outcome: Outcome) -> None:
    """Print the table of a complete run, where everything is, and how to go on from there."""
    results = outcome.results
    if results is None:
        raise ValueError(
            f"{outcome.folder} was stopped after {outcome.step} steps: nothing to show"
        )
    table = Table(pad_edge=False, box=None)
    table.add_column("vision tokens")
    for budget in results["accuracy"]:
        table.add_column(budget, justify="right", min_width=7)
    rows = {"all questions": results["accuracy"], **results["by_kind"]}
    for name, shares in rows.items():
        style = "bold" if name == "all questions" else ""
        table.add_row(name, *(f"{share:.1%}" for share in shares.values()), style=style)
    dense = results["cost"]["dense"]
    for name, key in (("decoder FLOPs", "flops"), ("key-value cache", "kv_bytes")):
        shown = (results["cost"].get(budget) for budget in results["accuracy"])
        shares = (f"{cost[key] / dense[key]:.1%}" if cost else "" for cost in shown)
        table.add_row(name, *shares, style="dim")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(f"right answers to {results['questions']:,} questions about held-out scans")
    console.print(table)
    console.print(
        "FLOPs and cache are shares of those of the dense model, whose decoder runs all layers on "
        f"all patches: {dense['flops'] / 1e6:,.1f} million, {dense['kv_bytes'] / 1024:,.1f} KiB"
    )

    folder, here = outcome.folder, Path.cwd()
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
    state = "was complete already" if outcome.was_complete else "complete"
    lines = [
        "",
        f"{folder} {state}: {results['steps']:,} steps, {results['parameters']:,} parameters, "
        f"{results['seconds']:.0f} s",
        f"  {ANSWERS:<14} questions with the answers",
        f"  {ACCURACY:<14} this table as curves",
        f"  {RESULTS:<14} this table as data",
        f"  {'model/':<14} the trained model, all that `zoo generate` needs",
        "",
        "Ask it yourself, about this picture or any other:",
        "  " + shlex.join(_example(folder, results["sample"])),
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _one_device_per_core(batch_size: int) -> None:
    """Without an accelerator, let each core be a device: small operations do not spread.

    A choice of the user's, by `JAX_NUM_CPU_DEVICES` or `XLA_FLAGS`, stands.
    """
    if "XLA_FLAGS" in os.environ or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # With many cores the shares become too small to be worth it.
    devices = max(n for n in (1, 2, 4, 8) if n <= (cores or 1) and batch_size % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)


def _example(folder: Path, sample: Mapping[str, str]) -> list[str]:
    """A command that answers the first question of the pictures, as it works from here."""
    program, installed = Path(sys.argv[0]), shutil.which("zoo")
    # In an environment that is not activated the command has to be called by its path.
    by_path = program.name == "zoo" and Path(installed or "") != program.absolute()
    command = [os.path.relpath(program) if by_path else "zoo", "generate", str(folder)]
    return [*command, "--image", str(folder / sample["image"]), "--prompt", sample["prompt"]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo quickstart",
        description="Train a small vision-language model on real scans, judge it and show it. "
        "The same command continues what was interrupted.",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="another model and another order of the data"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="train longer or shorter")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        metavar="DIR",
        help="folder of the run (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as one object")
    return parser


def _finished(folder: Path, step: int) -> dict[str, Any] | None:
    """The results that an earlier sitting has written, if they are all there."""
    if not all((folder / name).exists() for name in (ACCURACY, ANSWERS, SAMPLE)):
        return None
    try:
        results: dict[str, Any] = json.loads((folder / RESULTS).read_text("utf-8"))
        return results if results["steps"] == step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _longest_prompt(loaded: Loaded, experiment: Experiment) -> int:
    tokenizer = loaded.processor.tokenizer
    return max(len(prompt(tokenizer, text)) for text in experiment.data.texts())


def _draw(folder: Path, shares: Mapping[str, Any], samples: Sequence[Sample], bar: Bar) -> None:
    """Write the pictures."""
    bar.phase("drawing", 3)
    overall = _by_number(shares["accuracy"])
    by_kind = {kind: _by_number(of_kind) for kind, of_kind in shares["by_kind"].items()}
    title = "One model, any number of vision tokens"
    save(accuracy_figure(overall, by_kind, title=title), folder / ACCURACY)
    bar.update(1)
    title = "Questions about scans that the model has never seen"
    save(answers_figure(samples, title=title), folder / ANSWERS)
    bar.update(2)
    with writing(folder):
        Image.fromarray(samples[0].picture).save(folder / SAMPLE)
    bar.update(3)


def _samples(answered: Sequence[Answered]) -> list[Sample]:
    """The first questions of each kind, about a picture each, at the least, a middle and the most.

    The first ones, and not the best ones: what is shown is what the accuracy says.
    """
    kinds = sorted({a.kind for a in answered})
    budgets = list(answered[0].answers)
    shown = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})
    used: set[str] = set()
    samples = []
    for _ in range(_SHOWN_PER_KIND):
        for kind in kinds:
            fresh = [a for a in answered if a.kind == kind and a.name not in used]
            if fresh:
                used.add(fresh[0].name)
                picture = read_image(fresh[0].image)
                answers = {budget: fresh[0].answers[budget] for budget in shown}
                samples.append(Sample(picture, kind, fresh[0].question, fresh[0].expected, answers))
    return samples


def _by_number(shares: Mapping[str, float]) -> dict[int, float]:
    return {int(budget): share for budget, share in shares.items()}


def _model_name(experiment: Experiment) -> str:
    """The registered variant that is trained, or the name of the experiment if it is none."""
    variants = (item for entry in registered().values() for item in entry.variants.items())
    names = (name for name, config in variants if config == experiment.model)
    return next(names, experiment.name)
