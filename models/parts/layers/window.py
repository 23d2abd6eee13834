"""Windows on grids of one, two or three axes: cutting, shifting, and biases by relative position.

Follows: arXiv:2103.14030 (Swin), whose windows on two axes these are.
"""

import functools
import math
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array
from zoo.models.parts.layers.resize import resize_bicubic

A = TypeVar("A", Array, np.ndarray)
Grid = tuple[int, ...]

APART = -100.0
"""What is added to the logits of tokens that a shift has brought into one window: in float32 their
weight is 0.
"""


def partition(x: A, window: Grid) -> A:
    """[B, *grid, D] to windows [B, W, L, D], both in row-major order; the grid is a multiple."""
    axes = len(window)
    grid = x.shape[1 : 1 + axes]
    if x.ndim != axes + 2 or any(side % w for side, w in zip(grid, window, strict=True)):
        raise ValueError(f"x: got {x.shape}, want [B, {axes} axes in multiples of {window}, D]")
    pairs = [n for side, w in zip(grid, window, strict=True) for n in (side // w, w)]
    x = x.reshape(x.shape[0], *pairs, x.shape[-1])
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.transpose(order).reshape(x.shape[0], -1, math.prod(window), x.shape[-1])


def reverse(x: Array, window: Grid, grid: Grid) -> Array:
    """The inverse of `partition`: [B, W, L, D] to [B, *grid, D]."""
    axes = len(window)
    counts = [side // w for side, w in zip(grid, window, strict=True)]
    x = x.reshape(x.shape[0], *counts, *window, x.shape[-1])
    order = (0, *(n for axis in range(1, axes + 1) for n in (axis, axis + axes)), 2 * axes + 1)
    return x.transpose(order).reshape(x.shape[0], *grid, x.shape[-1])


def pad(x: Array, window: Grid) -> Array:
    """[B, *grid, D] with zeros at the ends of the axes, up to multiples of the window."""
    grid = x.shape[1:-1]
    ends = [(0, -side % w) for side, w in zip(grid, window, strict=True)]
    return jnp.pad(x, [(0, 0), *ends, (0, 0)]) if any(end for _, end in ends) else x


def crop(x: Array, grid: Grid) -> Array:
    """The beginning of [B, *grid', D], as large as `grid`."""
    return x[(slice(None), *(slice(side) for side in grid))]


def shift(x: Array, by: Grid) -> Array:
    """[B, *grid, D] moved towards the start of the axes, what falls off coming in at the end."""
    if not any(by):
        return x
    return jnp.roll(x, tuple(-step for step in by), tuple(range(1, 1 + len(by))))


def shift_mask(grid: Grid, window: Grid, by: Grid) -> Array | None:
    """What is added to the logits after `shift`: float32 [W, L, L], `APART` between tokens that are
    no neighbours, 0 elsewhere; None without a shift.
    """
    if not any(by):
        return None
    region = _regions(grid, window, by)  # [W, L]
    return jnp.where(region[:, :, None] != region[:, None, :], APART, 0.0)


@functools.lru_cache(maxsize=64)
def _regions(grid: Grid, window: Grid, by: Grid) -> np.ndarray:
    """Which part of the grid each token of each window came from, int32 [W, L]."""
    label: np.ndarray = np.zeros(grid, np.int32)
    for axis, (side, w, step) in enumerate(zip(grid, window, by, strict=True)):
        place = np.arange(side)
        part = (place >= side - w).astype(np.int32) + ((place >= side - step) if step else 0)
        label = label * 3 + part.reshape([-1 if i == axis else 1 for i in range(len(grid))])
    return partition(label[None, ..., None], window)[0, ..., 0]


@functools.lru_cache(maxsize=64)
def relative_index(window: Grid) -> np.ndarray:
    """Which row of a table of offsets each pair of tokens has, int32 [L, L].

    The row of query p and key q is the number that their distance, p - q + window - 1 on each axis,
    has in row-major order.
    """
    places = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1)
    places = places.reshape(-1, len(window))  # [L, axes]
    distance = places[:, None] - places[None] + np.array(window) - 1
    sides = tuple(2 * w - 1 for w in window)
    return np.ravel_multi_index(tuple(np.moveaxis(distance, -1, 0)), sides).astype(np.int32)


class RelativeBias(nn.Module):
    """A learned bias of the logits for every distance of two tokens in a window, and every head.

    Attributes:
      window: sides.
      num_heads: H.
    """

    window: Grid
    num_heads: int

    @nn.compact
    def __call__(self) -> Array:
        """Float32 [H, L, L]."""
        rows = math.prod(2 * w - 1 for w in self.window)
        init = nn.initializers.truncated_normal(0.02)
        init = nn.with_logical_partitioning(init, ("positions", "heads"))
        table = self.param("table", init, (rows, self.num_heads))
        index = relative_index(self.window)
        return table.astype(jnp.float32)[index].transpose(2, 0, 1)


def resize_bias(table: Array, old: Grid, new: Grid) -> Array:
    """The table [..., rows, H] of windows of two axes for windows of another size, by bicubic
    interpolation over the distances, as it is done before fine-tuning with larger images.
    """
    (a, b), (c, d) = (tuple(2 * w - 1 for w in sides) for sides in (old, new))
    if table.shape[-2] != a * b:
        raise ValueError(f"table: got {table.shape}, want {a * b} rows for windows of {old}")
    *lead, _, heads = table.shape
    return resize_bicubic(table.reshape(*lead, a, b, heads), c, d).reshape(*lead, c * d, heads)


def window_attention(
    q: Array, k: Array, v: Array, bias: Array | float = 0.0, mask: Array | None = None
) -> Array:
    """Attention within windows, softmax in float32.

    Args:
      q: queries [B, W, L, H, E].
      k: keys, alike.
      v: values, alike.
      bias: float32 [H, L, L], added to the logits.
      mask: float32 [W, L, L], added too.

    Returns:
      [B, W, L, H, E].
    """
    exact = {"preferred_element_type": jnp.float32}
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bwlhe,bwshe->bwhls", q, k, **exact) + bias
    if mask is not None:
        logits = logits + mask[:, None]
    weights = jax.nn.softmax(logits, -1).astype(v.dtype)
    return jnp.einsum("bwhls,bwshe->bwlhe", weights, v)
