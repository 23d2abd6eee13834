"""Choosing a part of the tokens with static shapes: `pick` gathers, `put` scatters back."""

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, take


def pick(
    score: Array, candidate: Array, count: Array, *, slots: int, capacity: int
) -> tuple[Array, Array]:
    """The `capacity` best candidates and all other tokens, in their order.

    The number of rows is static; how many candidates really count may differ per example. Tokens
    that are no candidates are always kept and never move relative to each other.

    Args:
      score: [B, L]; the greater, the better. Ties go to the earlier token.
      candidate: bool [B, L] with *exactly* `slots` True per row.
      count: int [B], how many candidates to keep, at most `capacity`.
      slots: static number of candidates.
      capacity: static number of candidate rows in the result, 0 to `slots`.

    Returns:
      index: int32 [B, L - slots + capacity], ascending.
      keep: bool of the same shape: False on the surplus of `capacity` over `count`.
    """
    if not 0 <= capacity <= slots:
        raise ValueError(f"capacity: got {capacity}, want 0 to slots = {slots}")
    place = jnp.argsort(
        jnp.where(candidate, -score.astype(jnp.float32), jnp.inf), axis=-1, stable=True
    )
    rank = jnp.argsort(
        place, axis=-1
    )  # [B, L], the best candidate has 0; the others come after all candidates
    chosen = ~candidate | (rank < capacity)
    length = score.shape[1] - slots + capacity
    index = jnp.argsort(~chosen, axis=-1, stable=True)[:, :length].astype(jnp.int32)
    keep = take(~candidate | (rank < jnp.minimum(count, capacity)[:, None]), index)
    return index, keep


def put(base: Array, index: Array, rows: Array, keep: Array) -> Array:
    """Write `rows` [B, C, ...] into `base` [B, L, ...] at `index` [B, C] where `keep` [B, C]."""

    def write(row: Array, at: Array, new: Array, ok: Array) -> Array:
        return row.at[jnp.where(ok, at, row.shape[0])].set(new.astype(row.dtype), mode="drop")

    return jax.vmap(write)(base, index, rows, keep)
