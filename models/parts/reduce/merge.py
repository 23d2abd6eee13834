"""Merging tokens that are alike. Follows: arXiv:2210.09461 (bipartite matching), arXiv:2305.17455
(matching of all with all).
"""

import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array
from zoo.models.parts.reduce.choose import gather


def unit(x: Array, *, eps: float = 1e-12) -> Array:
    """Vectors [..., D] of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), eps)


def cosine(a: Array, b: Array) -> Array:
    """Cosines of all of [..., N, D] with all of [..., M, D], float32 [..., N, M]."""
    return jnp.einsum("...nd,...md->...nm", unit(a), unit(b))


@struct.dataclass
class Matching:
    """Which tokens at even places are merged into which at odd ones.

    Attributes:
      index: int32 [..., N - r], the places of what remains: even tokens that are left alone, then
        all odd ones.
      groups: int32 [..., N], which of these each token is a part of.
    """

    index: Array
    groups: Array


def match(metric: Array, r: int, *, protect: int = 0, by_place: bool = False) -> Matching:
    """Match the `r` even tokens that are most like an odd one to that.

    Args:
      metric: [..., N, C], what is compared, by cosine.
      r: how many; no more than there are even tokens that are not protected, nor than N // 2.
      protect: tokens at the beginning that are neither merged nor merged into (a class token: 1).
      by_place: the tokens left alone stay in their order; by default the most alike come first.
    """
    n = metric.shape[-2]
    similar = cosine(metric[..., ::2, :], metric[..., 1::2, :])  # [..., E, O]
    even, odd = jnp.arange(0, n, 2), jnp.arange(1, n, 2)
    similar = jnp.where((even < protect)[:, None] | (odd < protect), -jnp.inf, similar)
    best, into = similar.max(-1), similar.argmax(-1)  # [..., E]
    r = min(r, (n - protect) // 2)
    order = jnp.argsort(-best, -1, stable=True)
    alone = order[..., r:]
    if by_place:
        alone = jnp.sort(alone, -1)
    lead = metric.shape[:-2]
    odds = jnp.broadcast_to(odd, (*lead, odd.size))
    index = jnp.concatenate([2 * alone, odds], -1).astype(jnp.int32)
    rank = jnp.argsort(order, -1)
    row = jnp.argsort(jnp.concatenate([alone, order[..., :r]], -1), -1)  # of the even ones alone
    of_even = jnp.where(rank < r, alone.shape[-1] + into, row)
    of_odd = jnp.broadcast_to(alone.shape[-1] + jnp.arange(odd.size), odds.shape)
    groups = jnp.zeros((*lead, n), jnp.int32)
    groups = groups.at[..., ::2].set(of_even.astype(jnp.int32))
    return Matching(index, groups.at[..., 1::2].set(of_odd.astype(jnp.int32)))


def mean_by_group(x: Array, groups: Array, number: int, *, weight: Array | None = None) -> Array:
    """The means [..., number, D] of the tokens [..., N, D] of every group; zeros of empty ones.

    Args:
      x: tokens.
      groups: int [..., N], -1 for none.
      number: of groups.
      weight: [..., N]; by default all weigh the same.
    """
    weight = jnp.ones(groups.shape, jnp.float32) if weight is None else weight.astype(jnp.float32)
    member = jax.nn.one_hot(groups, number, axis=-2) * weight[..., None, :]  # [..., G, N]
    total = member.sum(-1, keepdims=True)
    summed = jnp.einsum("...gn,...nd->...gd", member, x.astype(jnp.float32))
    return (summed / jnp.where(total == 0, 1, total)).astype(x.dtype)


@struct.dataclass
class Pairing(Matching):
    """Which tokens are merged into which, where each may be merged into any other.

    Attributes:
      source: int32 [..., r], those that are merged.
      target: int32 [..., r], what each of these is merged into, which may be the same for several.
    """

    source: Array
    target: Array


def likeness(metric: Array, protected: Array) -> Array:
    """Cosines of all pairs of tokens that may be merged, float32 [..., N, N]; -inf of a token with
    itself and with protected ones.

    Args:
      metric: [..., N, C], what is compared.
      protected: bool [..., N].
    """
    similar = cosine(metric, metric)
    similar = jnp.maximum(similar, similar.swapaxes(-1, -2))  # alike in both directions, exactly
    apart = (
        protected[..., None, :] | protected[..., :, None] | jnp.eye(metric.shape[-2], dtype=bool)
    )
    return jnp.where(apart, -jnp.inf, similar)


def match_all(alike: Array, importance: Array, r: int, *, order: Array | None = None) -> Pairing:
    """Pair `r` tokens, each with the one that is most like it of those that stay.

    The tokens are ranked by how much they are like any other, and may be merged into those of later
    rank only, so that of two that are nearest to each other one stays. Of what may be merged, those
    go that are most like another and matter least. Follows: arXiv:2305.17455, section 3.2.

    Args:
      alike: [..., N, N], see `likeness`.
      importance: float32 [..., N].
      r: how many; at most half of the tokens that may be merged.
      order: int [..., N], the ranking; by default that of `alike`, of equals the first first.
    """
    number = alike.shape[-1]
    order = jnp.argsort(-alike.max(-1), -1, stable=True) if order is None else order
    rank = jnp.argsort(order, -1)
    later = rank[..., None, :] > rank[..., :, None]
    best = jnp.where(later, alike, -jnp.inf).max(-1)  # -inf: there is nothing to be merged into
    source = jnp.argsort(importance - best, -1, stable=True)[..., :r]
    gone = (jnp.arange(number) == source[..., None]).any(-2)  # [..., N]
    rows = jnp.take_along_axis(alike, source[..., None], -2)  # [..., r, N]
    target = jnp.where(gone[..., None, :], -jnp.inf, rows).argmax(-1)
    index = jnp.argsort(gone, -1, stable=True)[..., : number - r]
    row = jnp.cumsum(~gone, -1) - 1
    into = jnp.put_along_axis(row, source, jnp.take_along_axis(row, target, -1), -1, inplace=False)
    return Pairing(*(x.astype(jnp.int32) for x in (index, into, source, target)))


def merge_pairs(x: Array, size: Array, found: Pairing, importance: Array) -> tuple[Array, Array]:
    """Tokens and sizes after the merge: a source brings its share of twice the softmax of the two
    importances, and what it is merged into keeps the other. Several sources of one token each take
    from it, so that its shares need not add up.

    Args:
      x: [..., N, D].
      size: float32 [..., N], how many tokens each stands for.
      found: r pairs.
      importance: float32 [..., N].

    Returns:
      [..., N - r, D] in the dtype of `x`, and float32 [..., N - r], whose sum is that of `size`.
    """
    share = 2 * jax.nn.softmax(importances_of(found, importance), -1)  # [..., r, 2]
    whole = x.astype(jnp.float32) * size[..., None]

    moved = share[..., :1] * gather(whole, found.source)
    moved += (share[..., 1:] - 1) * gather(whole, found.target)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    joins = jax.nn.one_hot(found.target, x.shape[-2], axis=-2)  # [..., N, r]
    merged = gather(whole + jnp.einsum("...nr,...rd->...nd", joins, moved, **exact), found.index)
    came = jnp.take_along_axis(size, found.source, -1)
    total = jnp.take_along_axis(
        size + jnp.einsum("...nr,...r->...n", joins, came, **exact), found.index, -1
    )
    return (merged / total[..., None]).astype(x.dtype), total


def importances_of(found: Pairing, importance: Array) -> Array:
    """Of every pair, the source first: [..., r, 2]."""
    pairs = (found.source, found.target)
    return jnp.stack([jnp.take_along_axis(importance, at, -1) for at in pairs], -1)
