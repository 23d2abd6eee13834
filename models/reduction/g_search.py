"""G-Search and P-Sigmoid: how many vision tokens each layer of a model needs, found by trying.

Vision tokens are ranked by the attention that the question paid them in the layer before, and each
layer runs the best of those that are still there. *G-Search* goes from the first layer to the last
and finds for each the least share that costs no accuracy. *P-Sigmoid* is for a budget: shares that
fall along a sigmoid over the layers, whose slope and height Bayesian optimisation finds. Nothing is
learned. Searches compile one program, which masks tokens (`at_rates`); a `GSearch` with what they
find drops them.

    scored = at_rates(config)
    rates = greedy(lambda rates: accuracy(scored(params, batch, rates)), depth)
    model.with_(reducer=GSearch(rates))

Follows: arXiv:2412.00556, of which no code is published. The form of the sigmoid, the grid of the
search and the score of a token are our reading.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.models.core.types import IMAGE, Array, Aux, Batch, Memory, Stream, Tokens
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.decoders.dropping import (
    DropAfter,
    attention_of,
    guiding,
    left_cells,
    with_total,
)
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.block import QKV
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.layers.selection import pick
from zoo.models.parts.reduce.base import Keep, check_keep

CARD = Card(
    slug="g_search",
    paper="arXiv:2412.00556",
    differs=(
        "A re-creation from the abstract: the score of a token, the grid of the greedy search and "
        "the sigmoid's form are our reading; the paper's accuracies are not claimed.",
    ),
)

LEAST = 1e-4
"""The least share of a sigmoid, which is a token of any picture."""

Rates = tuple[float, ...]
"""The share of the vision tokens that every layer runs; of the first it is 1."""

Accuracy = Callable[[Rates], float]
"""How good a model is with such shares; the greater, the better."""


def sigmoid_rates(depth: int, budget: float, slope: float, top: float = 1.0) -> Rates:
    """Shares that fall along a sigmoid, layer l having `top / (1 + exp(slope (l - c)))` and 1 at
    most, with c such that their mean is the budget; the first layer runs all.

    Raises:
      ValueError: a budget that no c has, since one layer runs all.
    """
    layer = np.arange(depth)

    def at(center: float) -> np.ndarray:
        rates = top / (1 + np.exp(np.clip(slope * (layer - center), -500, 500)))
        rates = np.clip(rates, LEAST, 1)
        rates[0] = 1
        return rates

    low, high = -1e3 / slope - depth, 1e3 / slope + depth
    if not at(low).mean() <= budget <= at(high).mean() + 1e-9:
        raise ValueError(
            f"a mean share of {budget}: want {at(low).mean():.4f} to {at(high).mean():.4f} for "
            f"{depth} layers, of which the first runs all tokens, and a sigmoid of height {top}"
        )
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).mean() < budget else (low, middle)
    return tuple(float(rate) for rate in at(high))


@dataclass(frozen=True)
class UpTo:
    """A share of so many tokens, rounded up, or a number of them."""

    keep: Keep

    def __call__(self, tokens: int) -> int:
        if isinstance(self.keep, int):
            return min(self.keep, tokens)
        assert isinstance(self.keep, float)
        return int(np.ceil(self.keep * tokens - 1e-9))


@dataclass(frozen=True)
class GSearch:
    """The policy.

    Attributes:
      keep: vision tokens that each layer runs, as shares of what there is at first or as numbers:
        one for every layer, all in the first and never more in a later one. A single one is that of
        all layers but the first; with a `slope` it is the mean of all.
      slope: of a sigmoid along which shares fall with the layers; None for shares as they are.
      top: height of this sigmoid.
    """

    keep: Keep = 0.5
    slope: float | None = None
    top: float = 1.0

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep, stages=len(self.keep) if isinstance(self.keep, tuple) else None)
        if self.slope is not None and (self.slope <= 0 or isinstance(self.keep, tuple)):
            raise ValueError(
                f"slope = {self.slope} and keep = {self.keep}: want a slope above 0, and one mean"
            )
        if self.top <= 0:
            raise ValueError(f"top = {self.top}: want a number above 0")

    def schedule(self, depth: int, slots: int) -> tuple[Keep, ...]:
        """What every layer of `depth` runs, of so many vision tokens.

        Raises:
          ValueError: a schedule of another length, one that grows or begins with less than all, or
            a budget that cannot be met.
        """
        each = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if slots and any(isinstance(one, int) and one > slots for one in each):
            raise ValueError(f"keep = {self.keep}: there are {slots} tokens; want 1 to {slots}")
        if self.keep == 1.0 and isinstance(self.keep, float):
            return (1.0,) * depth
        if self.slope is not None:
            assert not isinstance(self.keep, tuple)
            budget = self.keep / max(slots, self.keep) if isinstance(self.keep, int) else self.keep
            return sigmoid_rates(depth, budget, self.slope, self.top)
        if not isinstance(self.keep, tuple):
            return (1.0,) + (self.keep,) * (depth - 1)
        check_keep(self.keep, stages=depth)
        numbers = [UpTo(each)(slots or 10**6) for each in self.keep]
        if numbers != sorted(numbers, reverse=True) or numbers[0] < (slots or 10**6):
            raise ValueError(
                f"keep = {self.keep}: want all tokens in the first layer, which ranks them, and "
                "numbers that do not grow from layer to layer"
            )
        return self.keep

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose layers leave vision tokens out for the next.

        Raises:
          ValueError: see `schedule`.
        """
        keeps = self.schedule(len(plan), slots)
        policies: dict[int, LayerPolicy] = {}
        for layer, here in enumerate(keeps):
            behind = keeps[layer + 1] if layer + 1 < len(keeps) else here
            if behind != here or policies:
                policies[layer] = ByQuestion(UpTo(behind) if behind != here else None)
        return wrap(plan, policies)


def question_score(layer: Any, own: QKV, tokens: Tokens) -> Array:
    """The mean attention that the text which guides pays to every token, float32 [B, L]."""
    image = tokens.modality == IMAGE
    rows = jnp.argsort(image, -1, stable=True)  # text first
    there = jnp.take_along_axis(guiding(tokens), rows, -1)
    return attention_of(layer, own, tokens, rows, there)


@struct.dataclass
class ByQuestion(DropAfter):
    """Leaves out what the question attended to least in the layer that has run."""

    def score(self, layer: Any, own: QKV, tokens: Tokens) -> Array:
        """See `question_score`."""
        return question_score(layer, own, tokens)


@struct.dataclass
class Masked(LayerPolicy):
    """`ByQuestion` for shares that the program is given: `memory["rates"]`, float32 [depth].

    Tokens stay where they are and nobody sees them. Without these shares it is the plain layer.

    Attributes:
      behind: the number of the next layer.
      first: whether this is the first layer, which counts the tokens.
    """

    name: ClassVar[str] = "masked"

    behind: int | Array
    first: bool = struct.field(pytree_node=False, default=False)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del own
        if stream.slots == 0 or "rates" not in memory:
            return run(stream, state)
        stream, total = with_total(stream)
        projected, aux = layer.qkv(stream, memory), {"left_cells": left_cells(stream.tokens)}
        score = question_score(layer, projected, stream.tokens)
        stream, state, _ = run(stream, state)
        tokens = stream.tokens
        count = jnp.ceil(memory["rates"][self.behind] * total - 1e-4).astype(jnp.int32)
        score = jnp.where(tokens.valid, score, -1)
        image, every = tokens.modality == IMAGE, stream.slots
        _, keep = pick(score, image, count, slots=every, capacity=every)
        tokens = tokens.replace(valid=tokens.valid & keep)
        return stream.replace(tokens=tokens), state, aux


@dataclass(frozen=True)
class Searching:
    """The policy that searches run: `Masked` in all layers but the last."""

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose layers mask what the program is told to."""
        del slots
        return wrap(plan, {n: Masked(n + 1, first=n == 0) for n in range(len(plan) - 1)})


def at_rates(config: Any) -> Callable[[Any, Batch, Any], Array]:
    """A function of parameters, a batch of prompts, and the shares of all layers: float32 logits
    [B, V] of the token after each prompt. It is compiled once for all shares.

    Args:
      config: of a model with a decoder.
    """
    model = replace(config, policies=(*config.policies, Searching())).build()

    def read(self: Any, batch: Batch, rates: Array) -> Array:
        stream, memory = self.stream(batch, None)
        stream, _, _ = self.decoder.run(stream, None, {**memory, "rates": rates})
        place = jnp.arange(stream.hidden.shape[1])
        last = jnp.where(stream.tokens.valid, place, 0).max(-1)
        logits: Array = self.head(stream.hidden[jnp.arange(len(last)), last])
        return logits

    @jax.jit
    def run(params: Any, batch: Batch, rates: Array) -> Array:
        logits: Array = model.apply({"params": params}, batch, rates, method=read)
        return logits

    return lambda params, batch, rates: run(params, batch, jnp.asarray(rates, jnp.float32))


def greedy(accuracy: Accuracy, depth: int, *, tolerance: float = 0.0, grid: int = 16) -> Rates:
    """The least share of each layer, from the first to the last, with which the model is as good as
    with all tokens if all layers behind it have that share too.

    Where accuracy never falls with a share, no schedule that is as good has less in a layer.

    Args:
      accuracy: of a schedule; about depth times log2(grid) of them are tried.
      depth: number of layers.
      tolerance: how much worse it may be.
      grid: shares are multiples of 1 / grid.
    """
    enough = accuracy((1.0,) * depth) - tolerance
    found = [grid]
    for layer in range(1, depth):
        low, high = 1, found[-1]  # `high` is known to be good
        while low < high:
            middle = (low + high) // 2
            rates = [*found, *[middle] * (depth - layer)]
            good = accuracy(tuple(n / grid for n in rates)) >= enough
            low, high = (low, middle) if good else (middle + 1, high)
        found.append(high)
    return tuple(n / grid for n in found)


def search_sigmoid(
    accuracy: Accuracy,
    depth: int,
    budget: float,
    *,
    calls: int = 30,
    slopes: tuple[float, float] = (0.05, 5.0),
    tops: tuple[float, float] = (1.0, 2.0),
    seed: int = 0,
) -> tuple[GSearch, float]:
    """The sigmoid of this mean share with which a model is best, by Bayesian optimisation: a
    Gaussian process over slope (by its logarithm) and height, and the greatest expected gain.

    Args:
      accuracy: of a schedule.
      depth: number of layers.
      budget: the mean share.
      calls: how many schedules are tried; the first five are drawn.
      slopes: the least and the greatest slope.
      tops: the least and the greatest height.
      seed: of the draws.

    Returns:
      the policy, and its accuracy.

    Raises:
      UsageError: scikit-learn is not installed.
    """
    corner = np.array([[np.log(slopes[0]), tops[0]], [np.log(slopes[1]), tops[1]]])

    def policy(point: np.ndarray) -> GSearch:
        slope, top = corner[0] + point * (corner[1] - corner[0])
        return GSearch(budget, slope=float(np.exp(slope)), top=float(top))

    def value(point: np.ndarray) -> float:
        made = policy(point)
        assert made.slope is not None
        return accuracy(sigmoid_rates(depth, budget, made.slope, made.top))

    point, best = maximise(value, 2, calls=calls, seed=seed)
    return policy(point), best


def maximise(
    value: Callable[[np.ndarray], float], axes: int, *, calls: int = 30, seed: int = 0
) -> tuple[np.ndarray, float]:
    """The best point found in the unit cube, and its value: Bayesian optimisation with expected
    improvement, after five draws.

    Raises:
      UsageError: scikit-learn is not installed.
    """
    try:
        from scipy.stats import norm
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF
    except ImportError as error:
        raise UsageError(
            "Bayesian optimisation needs scikit-learn: pip install 'vlm-zoo[analysis]'"
        ) from error
    rng = np.random.default_rng(seed)
    points = [rng.random(axes) for _ in range(min(5, calls))]
    values = [value(point) for point in points]
    while len(points) < calls:
        kernel = RBF(0.3, (0.05, 2.0))
        process = GaussianProcessRegressor(kernel, alpha=1e-5, normalize_y=True, random_state=seed)
        with warnings.catch_warnings():  # a width at its bound will do
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(np.stack(points), np.array(values))
        tried = rng.random((512, axes))
        mean, spread = process.predict(tried, return_std=True)
        gain = mean - max(values)
        z = gain / np.maximum(spread, 1e-12)
        point = tried[np.argmax(gain * norm.cdf(z) + spread * norm.pdf(z))]
        points.append(point)
        values.append(value(point))
    best = int(np.argmax(values))
    return points[best], values[best]


def p_sigmoid(keep: Keep = 0.5, slope: float = 0.5) -> GSearch:
    """Shares along a sigmoid with this mean."""
    return GSearch(keep, slope=slope)


VARIANTS = {
    "g_search_llava_1_5_7b": replace(llava.VARIANTS["llava_1_5_7b"], policies=(GSearch(),)),
    # The paper's budget: 87.5 % of the tokens less.
    "g_search_llava_1_5_7b.sigmoid": replace(
        llava.VARIANTS["llava_1_5_7b"], policies=(p_sigmoid(0.125),)
    ),
    "g_search_tiny": replace(llava.VARIANTS["llava_tiny"], policies=(GSearch(),)),
}

register(CARD, VARIANTS, table=hub_table, reducers={"g_search": GSearch, "p_sigmoid": p_sigmoid})
