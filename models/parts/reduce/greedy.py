"""Subsets that are chosen one token after the other."""

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array


def max_min(distance: Array, number: int, *, mask: Array | None = None) -> Array:
    """The tokens that are farthest apart: each next one has the greatest distance to the nearest of
    those chosen, the first to its nearest neighbour. Ties go to the earlier token.

    Args:
      distance: [N, N], symmetric.
      number: of tokens.
      mask: bool [N], those that may be chosen.

    Returns:
      int32 [number], in the order of choice. Batches by `jax.vmap`.
    """
    size = len(distance)
    allowed = jnp.ones(size, bool) if mask is None else mask
    distance = jnp.where(allowed[:, None] & allowed, distance.astype(jnp.float32), jnp.inf)
    others = jnp.where(jnp.eye(size, dtype=bool), jnp.inf, distance)
    lowest = -jnp.inf
    first = jnp.argmax(jnp.where(allowed, others.min(-1), lowest))

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chosen, nearest, used = carry
        best = jnp.argmax(jnp.where(used, lowest, nearest))
        return (
            chosen.at[i].set(best),
            jnp.minimum(nearest, distance[best]),
            used.at[best].set(True),
        )

    chosen = jnp.zeros(number, jnp.int32).at[0].set(first)
    used = (~allowed).at[first].set(True)
    return jax.lax.fori_loop(1, number, add, (chosen, distance[first], used))[0]


def cover(gain: Array, number: int, *, mask: Array | None = None) -> Array:
    """The columns that cover the rows best: each next one adds the most to the sum over rows of the
    greatest entry among the chosen columns. Ties go to the earlier column.

    Args:
      gain: [R, N], not negative.
      number: of columns.
      mask: bool [N], those that may be chosen.

    Returns:
      int32 [number], in the order of choice. Batches by `jax.vmap`.
    """
    gain = gain.astype(jnp.float32)
    allowed = jnp.ones(gain.shape[1], bool) if mask is None else mask

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chosen, covered, used = carry
        more = jnp.maximum(gain - covered[:, None], 0).sum(0)
        best = jnp.argmax(jnp.where(used, -jnp.inf, more))
        covered = jnp.maximum(covered, gain[:, best])
        return chosen.at[i].set(best), covered, used.at[best].set(True)

    start = (jnp.zeros(number, jnp.int32), jnp.zeros(len(gain), jnp.float32), ~allowed)
    return jax.lax.fori_loop(0, number, add, start)[0]
