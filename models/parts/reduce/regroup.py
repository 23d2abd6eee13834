"""Scores and tokens on other grids: squares of patches, and what a batch interpolates."""

import jax.numpy as jnp

from zoo.models.core.types import Array, take


def squares(score: Array, grid: tuple[int, int], side: tuple[int, int]) -> Array:
    """Scores [..., h w] of a grid as the means of its squares, [..., h w / (sides)].

    Raises:
      ValueError: squares do not cover the grid.
    """
    if side == (1, 1):
        return score
    (h, w), (down, across) = grid, side
    if not down or not across or h % down or w % across:
        raise ValueError(f"squares of {side} do not cover a grid of {grid}")
    x = score.reshape(*score.shape[:-1], h // down, down, w // across, across)
    return x.mean((-3, -1)).reshape(*score.shape[:-1], -1)


def blended(flat: Array, layout: Array, blend: Array) -> Array:
    """Scores [B, V] of all tokens as those [B, S] of slots that are weighted sums of four tokens.

    Args:
      flat: scores.
      layout: int32 [B, S, 4]; numbers from V on (newlines) count as 0.
      blend: float32 [B, S, 4].
    """
    known = layout < flat.shape[1]
    found = jnp.stack([take(flat, jnp.where(known, layout, 0)[..., i]) for i in range(4)], -1)
    return jnp.sum(jnp.where(known, found, 0) * blend, -1)
