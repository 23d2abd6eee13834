"""Merging tokens that are alike. Follows: arXiv:2210.09461 (bipartite matching)."""

import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array


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
