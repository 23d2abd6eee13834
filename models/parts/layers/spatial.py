"""Rearrangements of grids: pixels into channels and back, pictures into tiles and back, each with
its inverse beside it; and pictures into overlapping squares. Nothing is computed here.
"""

import math
from typing import Literal

import jax.numpy as jnp

from zoo.models.core.types import Array

ChannelOrder = Literal["channels_first", "cells_first"]
"""Where the pixel (i, j) of channel c of a square of r x r pixels lies among C r^2 channels:
`channels_first` at c r^2 + i r + j (PyTorch's pixel shuffle), `cells_first` at (i r + j) C + c
(TensorFlow's depth to space). With C = 1 they are the same.
"""


def depth_to_space(x: Array, factors: tuple[int, ...], order: ChannelOrder) -> Array:
    """Channels become pixels: [..., h, w, C r s] to [..., h r, w s, C] for `factors` (r, s).

    Args:
      x: any number of leading axes, one axis for each factor, then the channels.
      factors: how much longer each axis becomes; as many as the grid has axes.
      order: of the channels that come in.

    Raises:
      ValueError: the channels are no multiple of the product of the factors.
    """
    n, cells = len(factors), math.prod(factors)
    *lead, channels = x.shape
    lead, grid = lead[:-n], lead[-n:]
    if channels % cells:
        raise ValueError(f"x: got {channels} channels, want a multiple of {cells} for {factors}")
    if _of(order) == "channels_first":
        x = x.reshape(*lead, *grid, channels // cells, *factors)
        x = jnp.moveaxis(x, -n - 1, -1)
    else:
        x = x.reshape(*lead, *grid, *factors, channels // cells)
    x = _interleaved(x, len(lead), n)  # [..., h, r, w, s, C]
    return x.reshape(*lead, *(g * f for g, f in zip(grid, factors, strict=True)), x.shape[-1])


def space_to_depth(x: Array, factors: tuple[int, ...], order: ChannelOrder) -> Array:
    """Pixels become channels: [..., h r, w s, C] to [..., h, w, C r s], the inverse of
    `depth_to_space`.

    Raises:
      ValueError: an axis of the grid is no multiple of its factor.
    """
    n = len(factors)
    *lead, channels = x.shape
    lead, grid = lead[:-n], lead[-n:]
    if any(g % f for g, f in zip(grid, factors, strict=True)):
        raise ValueError(f"x: got a grid {tuple(grid)}, want multiples of {factors}")
    small = [g // f for g, f in zip(grid, factors, strict=True)]
    pairs = [size for pair in zip(small, factors, strict=True) for size in pair]
    x = x.reshape(*lead, *pairs, channels)  # [..., h, r, w, s, C]
    k = len(lead)
    axes = [*range(k), *range(k, k + 2 * n, 2), *range(k + 1, k + 2 * n, 2), k + 2 * n]
    x = x.transpose(axes)  # [..., h, w, r, s, C]
    if _of(order) == "channels_first":
        x = jnp.moveaxis(x, -1, -n - 1)
    return x.reshape(*lead, *small, channels * math.prod(factors))


def split_tiles(x: Array, rows: int, columns: int) -> Array:
    """Cut grids [..., H, W, C] into tiles [..., rows, columns, H / rows, W / columns, C].

    Raises:
      ValueError: the tiles do not cover the grid.
    """
    *lead, height, width, channels = x.shape
    if height % rows or width % columns:
        raise ValueError(f"x: got a grid {(height, width)}, want multiples of {(rows, columns)}")
    x = x.reshape(*lead, rows, height // rows, columns, width // columns, channels)
    return x.swapaxes(-4, -3)


def merge_tiles(x: Array) -> Array:
    """[..., rows, columns, h, w, C] to [..., rows h, columns w, C]: undoes `split_tiles`."""
    *lead, rows, columns, height, width, channels = x.shape
    return x.swapaxes(-4, -3).reshape(*lead, rows * height, columns * width, channels)


def unfold(x: Array, size: int, stride: int, padding: int) -> Array:
    """Squares that may overlap: [..., H, W, C] to [..., h, w, C size^2], each in the order of
    torch's `Unfold`, pixel (i, j) of channel c at c size^2 + i size + j.

    Args:
      x: any number of leading axes.
      size: sides of the squares.
      stride: from one to the next.
      padding: zeros on every side of the picture.

    Raises:
      ValueError: the padded picture is smaller than a square.
    """
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(padding, padding)] * 2 + [(0, 0)])
    if min(x.shape[-3:-1]) < size:
        raise ValueError(f"x: got a grid {x.shape[-3:-1]} with its padding, want {size} or more")
    last_row, last_column = ((side - size) // stride * stride + 1 for side in x.shape[-3:-1])
    rows = [x[..., i : i + last_row : stride, :, :] for i in range(size)]
    x = jnp.stack(rows, -1)  # [..., h, W, C, i]
    columns = [x[..., j : j + last_column : stride, :, :] for j in range(size)]
    x = jnp.stack(columns, -1)  # [..., h, w, C, i, j]
    return x.reshape(*x.shape[:-3], -1)


def _of(order: str) -> str:
    if order not in ChannelOrder.__args__:
        raise ValueError(f"order = {order!r}: want one of {', '.join(ChannelOrder.__args__)}")
    return order


def _interleaved(x: Array, lead: int, n: int) -> Array:
    """[..., h, w, r, s, C] to [..., h, r, w, s, C]."""
    pairs = [axis for i in range(n) for axis in (lead + i, lead + n + i)]
    return x.transpose([*range(lead), *pairs, lead + 2 * n])
