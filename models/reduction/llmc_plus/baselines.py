"""Methods that look at the tokens alone: some of them by chance, evenly, or far from each other."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, TokenSet
from zoo.models.parts.reduce.base import Keep, Point, Reducer, Seen, Text, unmasked
from zoo.models.parts.reduce.choose import choose, gather
from zoo.models.parts.reduce.greedy import max_min
from zoo.models.parts.reduce.merge import cosine


@dataclass(frozen=True)
class Random(Reducer):
    """Some tokens by chance, the same places of every picture.

    Attributes:
      keep: tokens of every tile, as a number or a share.
      seed: of the choice.
    """

    keep: Keep = 0.25
    seed: int = 0

    point: ClassVar[Point] = "connector"

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept tokens of every tile, in their order."""
        del text
        shape = seen.tokens.shape[:-1]
        score = jax.random.uniform(jax.random.key(self.seed), shape[-1:])
        return choose(seen, jnp.broadcast_to(score, shape), keep)


@dataclass(frozen=True)
class Uniform(Reducer):
    """Tokens at equal distances in reading order.

    Attributes:
      keep: tokens of every tile, as a number or a share.
    """

    keep: Keep = 0.25

    point: ClassVar[Point] = "connector"

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept tokens of every tile, in their order."""
        del text
        shape = seen.tokens.shape[:-1]
        return choose(seen, jnp.broadcast_to(evenly(shape[-1], keep), shape), keep)


def evenly(tokens: int, number: int) -> Array:
    """Scores [tokens] that are 1 at `number` places at equal distances, from half a distance on,
    and 0 elsewhere.
    """
    places = (2 * jnp.arange(number) + 1) * tokens // (2 * number)
    return jnp.zeros(tokens).at[places].set(1.0)


@dataclass(frozen=True)
class DivPrune(Reducer):
    """The tokens that are least alike: each next one is farthest from the nearest of those chosen.
    Follows: arXiv:2503.02175.

    Attributes:
      keep: tokens of every tile, as a number or a share.
    """

    keep: Keep = 64 / 576

    point: ClassVar[Point] = "connector"

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept tokens of every tile, in their order."""
        del text
        allowed = unmasked(seen)

        def one(tokens: Array, mask: Array) -> Array:
            return divprune(tokens, keep, mask=mask)

        order = jax.vmap(jax.vmap(one))(seen.tokens, allowed)  # [B, M, K]
        if seen.mask is None:
            index = jnp.sort(order, -1)
            return TokenSet(gather(seen.tokens, index), index=index)
        count = allowed.sum(-1)
        if seen.in_slots:  # of every row its share
            count = jnp.maximum(1, count * seen.per_tile // seen.tile_tokens)
        there = jnp.arange(keep) < count[..., None]
        place = jnp.argsort(jnp.where(there, order, allowed.shape[-1]), -1, stable=True)
        index, there = (jnp.take_along_axis(x, place, -1) for x in (order, there))
        return TokenSet(gather(seen.tokens, index), there, index)


def divprune(tokens: Array, number: int, *, mask: Array | None = None) -> Array:
    """The chosen of tokens [N, D] by cosine, int32 [number], in the order of choice.

    Args:
      tokens: vectors.
      number: how many.
      mask: bool [N], those that may be chosen.
    """
    return max_min(1 - cosine(tokens, tokens), number, mask=mask)
