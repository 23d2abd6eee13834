"""Keeping the best tokens of every tile, in their order."""

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, TokenSet, take
from zoo.models.parts.reduce.base import Seen


def top(score: Array, number: int) -> Array:
    """The places of the `number` greatest of [..., N], ascending int32 [..., number]. Of equal ones
    the first are taken.
    """
    return jnp.sort(jax.lax.top_k(score, number)[1], -1).astype(jnp.int32)


def gather(tokens: Array, index: Array) -> Array:
    """Rows [..., K] of tokens [..., N, D]."""
    return jnp.take_along_axis(tokens, index[..., None], -2)


def choose(seen: Seen, score: Array, keep: int, *, count: Array | None = None) -> TokenSet:
    """The tokens of greatest score, in their order.

    Args:
      seen: the tokens.
      score: [B, M, N], as `seen.at_tokens` makes it.
      keep: rows of the result: of every tile, or of all where the tokens are slots.
      count: int [B, M'], how many of each tile, where that depends on the picture; at slots it is
        the share of a tile's N tokens that counts. By default all tiles keep the same.
    """
    score = score.astype(jnp.float32)
    if seen.mask is not None:
        score = jnp.where(seen.mask, score, -jnp.inf)
    if seen.in_slots:
        return _choose_slots(seen, score, keep, count)
    if count is None and seen.mask is None:
        index = top(score, keep)
        return TokenSet(gather(seen.tokens, index), index=index)
    most = score.shape[-1] if seen.mask is None else seen.mask.sum(-1)
    count = jnp.full(score.shape[:-1], keep) if count is None else count
    return in_order(seen.tokens, jax.lax.top_k(score, keep)[1], jnp.minimum(count, most))


def in_order(tokens: Array, best: Array, count: Array) -> TokenSet:
    """The first `count` of the tokens `best`, put into the order in which they stand.

    Args:
      tokens: [B, M, N, D].
      best: int [B, M, K], the best first.
      count: int [B, M], at most K.
    """
    there = jnp.arange(best.shape[-1]) < count[..., None]  # [B, M, K]
    order = jnp.argsort(jnp.where(there, best, tokens.shape[-2]), -1, stable=True)
    index, mask = (jnp.take_along_axis(x, order, -1) for x in (best, there))
    return TokenSet(gather(tokens, index), mask, index.astype(jnp.int32))


def _choose_slots(seen: Seen, score: Array, keep: int, count: Array | None) -> TokenSet:
    """`choose` among the slots of a sequence, of which every tile keeps its share."""
    assert seen.layout is not None
    tiles, tokens = seen.features.tokens.shape[1], seen.tile_tokens
    score, layout = score[:, 0], seen.layout[..., 0]  # [B, S]
    tile = jnp.minimum(layout // tokens, tiles)  # newlines are a tile of their own
    candidate = jnp.isfinite(score)
    size = _per_tile(candidate, tile, tiles + 1)  # [B, M' + 1]
    if count is None:
        count = jnp.full((len(score), tiles), seen.per_tile)
    share = jnp.pad(count, ((0, 0), (0, 1))) * size // tokens
    chosen = candidate & (rank_in_group(score, tile) < take(share, tile))
    index = jnp.argsort(~chosen, -1, stable=True)[:, :keep].astype(jnp.int32)
    return TokenSet(
        take(seen.tokens[:, 0], index)[:, None], take(chosen, index)[:, None], index[:, None]
    )


def _per_tile(chosen: Array, tile: Array, tiles: int) -> Array:
    """How many of each tile, int32 [B, tiles]."""
    return jax.vmap(lambda c, t: jnp.zeros(tiles, jnp.int32).at[t].add(c))(chosen, tile)


def rank_in_group(score: Array, group: Array) -> Array:
    """The rank of every token among those of its group by descending score, int32 [B, N]; of equal
    ones the first come first.

    Args:
      score: [B, N].
      group: int [B, N].
    """
    order = jnp.argsort(-score, -1, stable=True)
    order = take(order, jnp.argsort(take(group, order), -1, stable=True))  # by group, then score
    place = jnp.arange(score.shape[-1])
    first = jnp.diff(take(group, order), axis=-1, prepend=-1) != 0
    start = jax.lax.cummax(jnp.where(first, place, 0), axis=1)
    return take(place - start, jnp.argsort(order, -1))
