"""From logits to a token: repetition penalty, temperature, top-k, top-p and the draw.

All are functions of arrays, and their settings are data: a program that is compiled once serves
every setting, and what is switched off is skipped when it runs. The order and the meaning are those
of transformers: the penalty always, then, only where a token is drawn, temperature, top-k, top-p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array

_SEEDS = 1 << 32


class Knobs(NamedTuple):
    """`Sampling` as arrays, for one batch."""

    temperature: Array  # float32 []
    top_k: Array  # int32 []
    tail: Array  # float32 [], 1 - top_p
    penalty: Array  # float32 []
    seeds: Array  # uint32 [B]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. By default the most likely one is taken.

    Attributes:
      temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
      top_k: only so many most likely tokens (and those that are just as likely as the last of them)
        may be drawn; 0 for all.
      top_p: only the fewest most likely tokens whose probabilities add up to it may be drawn; above
        0, at most 1.
      repetition_penalty: positive logits of tokens that the prompt or the answer has are divided by
        it, negative ones multiplied; above 0, and 1 changes nothing.
      seed: of the draws. Row i of a batch draws with `seed + i`, whatever the other rows are: the
        same prompt asked alone with that seed has the same answer.

    Raises:
      UsageError: a number is out of its range, or one is set that only matters where a token is
        drawn, at temperature 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}: want a number from 0 on")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}: want a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: want a share above 0 and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty}: want a number above 0, such as "
                "1, which changes nothing"
            )
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"seed is {self.seed}: want 0 to 2^32 - 1")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UsageError(
                "top_k and top_p say which tokens may be drawn, and at temperature 0 none is "
                "drawn: give a temperature, such as 1"
            )

    def knobs(self, rows: int) -> Knobs:
        """The settings as data for a batch of so many rows."""
        return Knobs(
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(1 - self.top_p),
            np.float32(self.repetition_penalty),
            ((self.seed + np.arange(rows, dtype=np.uint64)) % _SEEDS).astype(np.uint32),
        )


def choose(logits: Array, seen: Array, knobs: Knobs, step: Array) -> Array:
    """The next token of every row.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], the tokens that the penalty applies to.
      knobs: the settings.
      step: int32 [], how many tokens the answers have; every step has draws of its own.

    Returns:
      int32 [B].
    """
    logits = penalize(logits, seen, knobs.penalty)

    def draw() -> Array:
        keys = jax.vmap(jax.random.key)(knobs.seeds)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(keys, warp(logits, knobs))

    chosen = jax.lax.cond(knobs.temperature > 0, draw, lambda: logits.argmax(-1))
    return chosen.astype(jnp.int32)


def penalize(logits: Array, seen: Array, penalty: Array) -> Array:
    """Logits [B, V] with those of `seen` [B, V] tokens made smaller by a penalty above 1.

    Follows: arXiv:1909.05858, section 4.1, in the form that transformers gave it.
    """
    smaller = jnp.where(logits < 0, logits * penalty, _divided(logits, penalty))
    return jnp.where(seen, smaller, logits)


def warp(logits: Array, knobs: Knobs) -> Array:
    """Logits [B, V] of the distribution to draw from: -inf where a token may not be drawn."""
    logits = _divided(logits, knobs.temperature)
    logits = jax.lax.cond(knobs.top_k > 0, keep_top_k, lambda x, _: x, logits, knobs.top_k)
    return jax.lax.cond(knobs.tail > 0, keep_top_p, lambda x, _: x, logits, knobs.tail)


def keep_top_k(logits: Array, k: Array) -> Array:
    """Logits [B, V], -inf where they are less than the k-th largest of their row; `k` int32 []."""
    order = _ordered(logits)
    bound = _first(order, lambda t: (order > t).sum(-1, keepdims=True) < k)
    return jnp.where(order >= bound, logits, -jnp.inf)


def keep_top_p(logits: Array, tail: Array) -> Array:
    """Logits [B, V], -inf on the least likely tokens that together have at most `tail` of the
    probability; of equally likely ones the first go first. The most likely one stays.

    Follows: arXiv:1904.09751.
    """
    order, share = _ordered(logits), jax.nn.softmax(logits, -1)

    def upto(t: Array) -> Array:
        return jnp.where(order <= t, share, 0).sum(-1, keepdims=True)

    bound = _first(order, lambda t: upto(t) > tail)
    tied = order == bound
    rank = tied.cumsum(-1)  # from 1, in the order of the vocabulary
    stays = (upto(bound - 1) + rank * share > tail) | (rank == rank[:, -1:])
    return jnp.where((order > bound) | (tied & stays), logits, -jnp.inf)


def _divided(x: Array, by: Array) -> Array:
    """`x` / `by` to the last bit: XLA would multiply by the reciprocal of a scalar."""
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


def _ordered(x: Array) -> Array:
    """int32 that compare as the float32 `x` do."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _first(order: Array, reached: Callable[[Array], Array]) -> Array:
    """The smallest int32 [B, 1] that `reached` holds for, among those from the smallest to the
    largest of `order` [B, V], where it is taken to hold.

    32 sums over a row, where sorting it would take twenty times as long on a CPU.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        holds = reached(middle)
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    bounds = (order.min(-1, keepdims=True) - 1, order.max(-1, keepdims=True))
    return jax.lax.fori_loop(0, 32, halve, bounds)[1]
