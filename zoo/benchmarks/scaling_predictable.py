"""Learning curves: how the error falls, and the best model grows, with the data it is trained on.

Nested random shards of the training data are each learned by models of growing capacity until the
best one lies between two worse ones. Its errors and its sizes follow power laws of the number of
examples, between the region of few examples, where nothing beats guessing, and the error that no
data removes. `zoo scaling` fits such laws to logs that are there already.

Follows: arXiv:1712.00409, section 3. No official code is known.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from zoo.evaluate.powerlaw import PowerLaw, bootstrap, fit_power_law
from zoo.evaluate.tables import read_rows
from zoo.models.core.card import Card
from zoo.models.core.config import SystemConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.plot import power_law_figure, save

CARD = Card(
    slug="scaling_predictable",
    paper="arXiv:1712.00409",
    differs=(
        "The offset, where it is fitted, has the least squared relative error of the whole curve, "
        "not of what is left above the offset: that measure would change with the offset.",
        "Shards are prefixes of one order by hash, so that a data set that grows keeps its shards.",
    ),
)


@dataclass(frozen=True)
class Point:
    """The best model of one shard.

    Attributes:
      examples: of the shard.
      error: on the validation set, which is the same for all shards.
      parameters: of that model.
      capacity: which of the capacities it is.
      bracketed: whether a smaller and a larger one were worse; if not, the error may be too high.
    """

    examples: int
    error: float
    parameters: int
    capacity: int
    bracketed: bool


@dataclass(frozen=True)
class Curves:
    """What a study finds.

    Attributes:
      points: all of them, by growing shards.
      error: the law of the errors, from the shards in its region.
      growth: the law of the parameters: `beta` is how fast models grow; None where all are equal.
    """

    points: tuple[Point, ...]
    error: PowerLaw
    growth: PowerLaw | None


Train = Callable[[int, int], tuple[float, int]]
"""(examples, capacity) -> the best validation error of a training with as many examples, and the
number of parameters. What else has to change with them (learning rate, regularisation) is its own
affair.
"""


@dataclass(frozen=True)
class StudyConfig(SystemConfig):
    """How a learning curve is measured.

    Attributes:
      factor: how much larger each shard is than the one before.
      least: share of the data in the smallest shard.
      guess: the error of guessing; shards with more than `plateau` of it are not fitted.
      plateau: see `guess`.
      offset: whether the error that no data removes is fitted; it is 0 by default.
    """

    factor: float = 2.0
    least: float = 0.001
    guess: float | None = None
    plateau: float = 0.9
    offset: bool = False

    def __post_init__(self) -> None:
        if self.factor <= 1 or not 0 < self.least <= 1 or not 0 < self.plateau <= 1:
            raise ValueError(
                f"factor = {self.factor}, least = {self.least}, plateau = {self.plateau}: want "
                "more than 1, and shares above 0 and up to 1"
            )

    def build(self) -> "Study":
        """The study."""
        return Study(self)


@dataclass(frozen=True)
class Study:
    """Shards, measurements and fits by one configuration."""

    config: StudyConfig

    def shards(self, examples: int) -> tuple[int, ...]:
        """The sizes of the shards of so many examples, growing, the last one all of them."""
        number, sizes = float(examples), []
        while number >= max(1, self.config.least * examples):
            sizes.append(round(number))
            number /= self.config.factor
        return tuple(sorted(set(sizes)))

    def run(self, examples: int, capacities: int, train: Train) -> Curves:
        """Measure and fit.

        Args:
          examples: in the whole training set.
          capacities: how many there are, numbered from 0 by growing size.
          train: trains one model; called once at most for each pair.
        """
        points, near = [], 0
        for size in self.shards(examples):
            points.append(best_of(size, capacities, train, near))
            near = points[-1].capacity  # the best model does not shrink when data is added
        return self.fit(points)

    def fit(self, points: Sequence[Point]) -> Curves:
        """The laws of measured points.

        Raises:
          UsageError: too few of them lie in the region of the power law.
        """
        kept = [point for point in points if not self._guesses(point.error)]
        if len(kept) < 2:
            raise UsageError(
                f"{len(kept)} of {len(points)} shards are better than guessing: want 2 or more"
            )
        sizes = [point.examples for point in kept]
        gamma = None if self.config.offset else 0.0
        error = fit_power_law(sizes, [point.error for point in kept], gamma=gamma)
        parameters = [point.parameters for point in kept]
        growth = fit_power_law(sizes, parameters) if len(set(parameters)) > 1 else None
        return Curves(tuple(points), error, growth)

    def _guesses(self, error: float) -> bool:
        c = self.config
        return c.guess is not None and error > c.plateau * c.guess


def best_of(examples: int, capacities: int, train: Train, start: int = 0) -> Point:
    """The capacity whose neighbours are both worse, found from `start` on by going downhill."""
    seen: dict[int, tuple[float, int]] = {}

    def error(capacity: int) -> float:
        if capacity not in seen:
            seen[capacity] = train(examples, capacity)
        return seen[capacity][0]

    at = min(start, capacities - 1)
    while True:
        around = [i for i in (at - 1, at + 1) if 0 <= i < capacities]
        better = [i for i in around if error(i) < error(at)]
        if not better:
            return Point(examples, error(at), seen[at][1], at, len(around) == 2)
        at = min(better, key=error)


def nested(names: Iterable[str], seed: int = 0) -> list[str]:
    """The names of examples in the order whose prefixes are the shards: random, decided by `seed`
    and each name alone, so that every shard is part of all larger ones.
    """
    return sorted(names, key=lambda name: sha256(f"{seed}/{name}".encode()).digest())


def main(argv: Sequence[str]) -> int:
    """Fit power laws to columns of logs: one line for each group, a figure if wanted.

    Raises:
      UsageError: nothing to fit in the files, with the columns that there are.
    """
    args = _parser().parse_args(argv)
    rows = read_rows(args.paths, (args.x, args.y, *([args.by] if args.by else [])))
    groups = _grouped(rows, args)
    facts, drawn = [], {}
    for name, (sizes, errors) in groups.items():
        gamma = None if args.offset else 0.0
        law = fit_power_law(sizes, errors, gamma=gamma)
        spread = bootstrap(sizes, errors, gamma=gamma, confidence=args.confidence)
        low, high = law.interval(args.confidence)
        facts.append({"group": name, **asdict(law), "beta_interval": (low, high), **_ends(spread)})
        drawn[name] = (sizes, errors, law)
    if args.figure is not None:
        title = f"{args.y} against {args.x}"
        save(power_law_figure(drawn, title=title, x=args.x, y=_meaning(args)), args.figure)
    print(json.dumps(facts, indent=2) if args.json else _lines(facts, args.confidence))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo scaling", description=main.__doc__.split("\n")[0])
    parser.add_argument(
        "paths", nargs="+", type=Path, help="CSV or JSONL files (metrics.jsonl of runs), or folders"
    )
    parser.add_argument("--x", default="step", help="column of the sizes (default: step)")
    parser.add_argument("--y", default="loss", help="column of the errors (default: loss)")
    parser.add_argument("--by", help="column that tells groups apart; by default files do")
    parser.add_argument("--best", type=float, help="y is a score: its error is BEST - y")
    parser.add_argument("--offset", action="store_true", help="fit the error that remains, too")
    parser.add_argument("--from", dest="least", type=float, default=0, help="least x that is read")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--figure", type=Path, help="write the points and curves as a PNG")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    return parser


def _grouped(
    rows: Iterable[Mapping[str, Any]], args: argparse.Namespace
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sizes and errors by group."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        size, value = float(row[args.x]), float(row[args.y])
        error = value if args.best is None else args.best - value
        if size >= args.least and size > 0:
            found.setdefault(str(row[args.by or "file"]), []).append((size, error))
    return {name: (a[:, 0], a[:, 1]) for name, pairs in found.items() for a in [np.array(pairs)]}


def _meaning(args: argparse.Namespace) -> str:
    return args.y if args.best is None else f"{args.best:g} − {args.y}"


def _ends(spread: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {f"{name}_resampled": ends for name, ends in spread.items()}


def _lines(facts: Sequence[Mapping[str, Any]], confidence: float) -> str:
    """The table that people read."""
    width = max(len(each["group"]) for each in facts)
    percent = f"{100 * confidence:g} %"
    lines = [
        f"{'group':{width}}  points     alpha      beta  {percent + ' interval':>20}"
        f"  {'resampled':>20}     gamma     R²"
    ]
    for each in facts:
        low, high = each["beta_interval"]
        first, last = each["beta_resampled"]
        lines.append(
            f"{each['group']:{width}}  {each['points']:6d}  {each['alpha']:8.4g}"
            f"  {each['beta']:8.4f}  [{low:8.4f}, {high:8.4f}]  [{first:8.4f}, {last:8.4f}]"
            f"  {each['gamma']:8.4g}  {each['r2']:.3f}"
        )
    return "\n".join(lines)


VARIANTS = {
    # The shards of the paper: from a thousandth of the data upwards, each twice the one before.
    "scaling_predictable": StudyConfig(),
    "scaling_predictable_tiny": StudyConfig(least=1 / 32),
}

register(CARD, VARIANTS)
