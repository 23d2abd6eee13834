"""Encoding models: how well the features of a network predict what was measured in a brain, and
where a network that sees and reads beats all that do one of the two.

Ridge regression from features to responses is cross-validated over contiguous folds; half of each
held-out fold chooses the penalty for every target, the other half judges it. Events are resampled
the same way for all networks, so that these can be compared in pairs.

Follows: arXiv:2406.14481. The recordings are not public.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from scipy import sparse, stats

from zoo.evaluate.ridge import pearson, ridge, with_ones
from zoo.models.core.card import Card
from zoo.models.core.config import SystemConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch

CARD = Card(
    slug="brain_vl_probing",
    paper="arXiv:2406.14481",
    code="https://github.com/vsubramaniam851/brain-multimodal",
    differs=(
        "All penalties come from one decomposition per fold, in float64.",
        "A constant prediction or response correlates with nothing (0) instead of being NaN.",
        "Features that are constant in a training fold stay 0 instead of being divided by 0.",
        "Resampling draws events within every held-out half and keeps the fitted weights.",
        "The projection is drawn by NumPy: the law is scikit-learn's, the draws are not.",
    ),
)


@dataclass(frozen=True)
class ProbingConfig(SystemConfig):
    """How features are judged.

    Attributes:
      folds: K, contiguous parts of the events in their order.
      alphas: penalties that validation chooses from.
      epsilon: by how much a projection may change distances; decides its width.
      samples: resamplings of the events.
      confidence: share of them inside of the intervals.
      seed: of projection and resampling.
    """

    folds: int = 5
    alphas: tuple[float, ...] = tuple(10.0**power for power in range(-1, 6))
    epsilon: float = 0.1
    samples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or not self.alphas or min(self.alphas) <= 0:
            raise ValueError(
                f"folds = {self.folds}, alphas = {self.alphas}: want 2 folds or more, and "
                "penalties above 0"
            )

    def build(self) -> "Probe":
        """The probe."""
        return Probe(self)


@dataclass(frozen=True)
class Probed:
    """How well features predict E targets.

    Attributes:
      validation: [A, E], mean correlation over the folds for every penalty.
      test: [A, E], likewise of the halves that chose nothing.
      chosen: [E], which penalty validation chose.
      alpha: [E], its value.
      interval: [2, E], ends of the validation score over resampled events.
      drawn: [S, E], test scores of the resampled events, the same events for all features.
    """

    validation: np.ndarray
    test: np.ndarray
    chosen: np.ndarray
    alpha: np.ndarray
    interval: np.ndarray
    drawn: np.ndarray

    @property
    def best_validation(self) -> np.ndarray:
        """[E], at the chosen penalty."""
        return np.take_along_axis(self.validation, self.chosen[None], 0)[0]

    @property
    def best_test(self) -> np.ndarray:
        """[E], at the chosen penalty."""
        return np.take_along_axis(self.test, self.chosen[None], 0)[0]


@dataclass(frozen=True)
class Probe:
    """The evaluation by one configuration."""

    config: ProbingConfig

    def __call__(self, features: np.ndarray, targets: np.ndarray) -> Probed:
        """Judge features.

        Args:
          features: [n, ...], one row per event in the order in which they happened; whatever
            follows is flattened, and projected if it is wider than `width` says.
          targets: [n, E].

        Raises:
          UsageError: fewer than four events per fold, or arrays that do not fit each other.
        """
        c = self.config
        if len(features) < 4 * c.folds:
            raise UsageError(f"{len(features)} events: want {4 * c.folds} for {c.folds} folds")
        x = self.narrow(features.reshape(len(features), -1))
        held = [self._held_out(x, targets, part) for part in self._parts(len(x))]
        validation = np.mean([pearson(made, true) for (made, true), _ in held], 0)
        test = np.mean([pearson(made, true) for _, (made, true) in held], 0)
        chosen = validation.argmax(0)
        drawn = [self._resampled(half, chosen) for half in zip(*held, strict=True)]
        tail = (1 - c.confidence) / 2
        interval = np.quantile(drawn[0], (tail, 1 - tail), axis=0)
        alpha = np.array(c.alphas)[chosen]
        return Probed(validation, test, chosen, alpha, interval, drawn[1])

    def width(self, events: int) -> int:
        """How many dimensions keep all distances of so many events within `epsilon`, by the lemma
        of Johnson and Lindenstrauss.
        """
        e = self.config.epsilon
        return int(4 * math.log(events) / (e**2 / 2 - e**3 / 3))

    def narrow(self, features: np.ndarray) -> np.ndarray:
        """[n, d] as it is, or projected to `width(n)` dimensions if it has more.

        The projection is sparse: of its entries a share 1 / sqrt(d) is not 0.
        """
        n, d = features.shape
        width = self.width(n)
        if d <= width:
            return features
        rng, density = np.random.default_rng(self.config.seed), 1 / math.sqrt(d)
        counts = rng.binomial(d, density, width)
        columns = [rng.choice(d, count, replace=False) for count in counts]
        signs = rng.choice((-1.0, 1.0), counts.sum()) / math.sqrt(density * width)
        ends = np.concatenate([[0], np.cumsum(counts)])
        matrix = sparse.csr_array((signs, np.concatenate(columns), ends), shape=(width, d))
        return np.asarray((matrix @ features.T).T)

    def _parts(self, events: int) -> list[np.ndarray]:
        return np.array_split(np.arange(events), self.config.folds)

    def _held_out(
        self, x: np.ndarray, y: np.ndarray, part: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """(made [A, m, E], true [m, E]) of the two halves of a fold."""
        train = np.delete(np.arange(len(x)), part)
        mean, std = x[train].mean(0), x[train].std(0)
        scaled = (x - mean) / np.where(std > 0, std, 1)
        weights = ridge(scaled[train], y[train], self.config.alphas)
        made = with_ones(scaled[part]) @ weights  # [A, m, E]
        half = len(part) // 2
        return (made[:, :half], y[part[:half]]), (made[:, half:], y[part[half:]])

    def _resampled(
        self, half: tuple[tuple[np.ndarray, np.ndarray], ...], chosen: np.ndarray
    ) -> np.ndarray:
        """Scores [S, E] at the chosen penalties, over events drawn with replacement."""
        rng, total = np.random.default_rng(self.config.seed), 0
        for made, true in half:
            best = np.take_along_axis(made, chosen[None, None], 0)[0]  # [m, E]
            drawn = rng.integers(len(true), size=(self.config.samples, len(true)))
            total = total + np.stack([pearson(best[row], true[row]) for row in drawn])
        return total / len(half)


def beats(
    ours: np.ndarray,
    theirs: np.ndarray,
    kept: np.ndarray,
    *,
    least: int = 10,
    rate: float = 0.05,
) -> np.ndarray:
    """At which sites one network predicts better than another: a paired one-sided t test over the
    time bins of each, corrected for the number of sites by Benjamini and Hochberg.

    Args:
      ours: [sites, bins], scores of the network that may be better.
      theirs: of the other one.
      kept: bool [sites, bins], such as those where the lower end of an interval is above 0.
      least: bins that a site must have; sites with fewer pass nothing.
      rate: of false discoveries.

    Returns:
      bool [sites].
    """
    enough = kept.sum(1) >= least
    p = np.ones(len(ours))
    for site in np.flatnonzero(enough):
        a, b = (scores[site, kept[site]] for scores in (ours, theirs))
        found = stats.ttest_rel(a, b, alternative="greater").pvalue
        p[site] = 1.0 if np.isnan(found) else found
    passed = np.zeros(len(ours), bool)
    if enough.any():
        passed[enough] = stats.false_discovery_control(p[enough]) <= rate
    return passed


def layer_features(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Batch],
    read: Callable[[Any], Array],
    **options: Any,
) -> np.ndarray:
    """Features of events from any model: [n, ...].

    Args:
      model: a module, such as `zoo.create` returns.
      variables: its own.
      batches: what it takes, in the order of the events.
      read: picks the features out of what it returns, such as `lambda out: out.pooled`, or
        `lambda out: out.features.taps[3]` with the option `taps=(3,)`.
      **options: of the module's call.
    """
    run = jax.jit(lambda v, batch: read(model.apply(v, batch, **options)))
    return np.concatenate([np.asarray(run(variables, batch)) for batch in batches])


VARIANTS = {
    # The settings of the official command line.
    "brain_vl_probing": ProbingConfig(),
    # The default of its function.
    "brain_vl_probing.nine_folds": ProbingConfig(folds=9),
}

register(CARD, VARIANTS)
