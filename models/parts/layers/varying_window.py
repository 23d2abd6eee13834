"""Varying window attention: each of 8 x 8 windows of a map attends to a context around it that is r
times as wide, whose cells were made fewer first, so that every context has as many cells as a
window.

Follows: arXiv:2404.16573.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array
from zoo.models.parts.layers.conv import ConvNormAct
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.layers.norms import BatchNorm
from zoo.models.parts.layers.spatial import merge_tiles, space_to_depth, split_tiles
from zoo.models.parts.layers.window import window_attention

SIDE = 8
"""Windows per side of a map."""

Out = Literal["norm", "bias"]
"""What follows attention: a map without a bias and a batch norm, or a map with a bias."""


class VaryingWindow(nn.Module):
    """Attention of windows to their contexts: [B, h, w, D] -> [B, h, w, D].

    Attributes:
      width: D, a multiple of `ratio` squared.
      ratio: r, how much wider a context is than its window.
      num_heads: attention heads.
      out_kind: what follows attention.
      skip: whether the map itself is added.
    """

    width: int
    ratio: int
    num_heads: int = 1
    out_kind: Out = "norm"
    skip: bool = True

    def setup(self) -> None:
        d, h, r = self.width, self.num_heads, self.ratio
        if d % h or d % r**2:
            raise ValueError(
                f"width = {d}: want a multiple of num_heads = {h} and of ratio^2 = {r**2}"
            )
        e, axes = d // h, ("embed", "heads", "head_dim")
        init = nn.initializers.normal(0.01)
        self.shrink = ConvNormAct(d // r**2, r, padding=0)
        self.q = Proj("...d,dhe->...he", (d, h, e), axes, bias=True, init=init)
        self.k = Proj("...d,dhe->...he", (d, h, e), axes, bias=True, init=init)
        self.v = Proj("...d,dhe->...he", (d, h, e), axes, bias=True, init=init)
        shape, back = (h, e, d), ("heads", "head_dim", "embed")
        self.out = Proj("...he,hed->...d", shape, back, num_in=2, bias=self.out_kind == "bias")
        if self.out_kind == "norm":
            self.out_norm = BatchNorm(start=0.0)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Sides of the map are multiples of 8."""
        check_map(x)
        windows = split_tiles(x, SIDE, SIDE)  # [B, 8, 8, h / 8, w / 8, D]
        context = space_to_depth(self.contexts(x, train=train), (self.ratio,) * 2, "cells_first")
        batch, shape = x.shape[0], windows.shape
        tokens = windows.reshape(batch, SIDE**2, -1, self.width)
        cells = context.reshape(batch, SIDE**2, -1, self.width)
        y = window_attention(self.q(tokens), self.k(cells), self.v(cells))
        y = merge_tiles(self.out(y).reshape(shape))
        if self.out_kind == "norm":
            y = self.out_norm(y, train=train)
        return y + x if self.skip else y

    def reduced(self, x: Array, *, train: bool = False) -> Array:
        """The map with r^2 times fewer channels [B, h, w, D / r^2], a cell having seen r x r."""
        edge = (self.ratio // 2 - 1, self.ratio // 2)
        if self.ratio == 1:
            edge = (0, 0)
        return self.shrink(jnp.pad(x, ((0, 0), edge, edge, (0, 0))), train=train)

    def contexts(self, x: Array, *, train: bool = False) -> Array:
        """The context of every window, [B, 8, 8, r h / 8, r w / 8, D / r^2]."""
        x, r = self.reduced(x, train=train), self.ratio
        height, width = (side // SIDE for side in x.shape[1:3])
        x = _shifted_copies(_shifted_copies(x, r, width, 2), r, height, 1)
        blocks = SIDE + r - 1
        x = x[:, : blocks * height, : blocks * width]
        x = x.reshape(x.shape[0], blocks, height, blocks, width, x.shape[-1])
        around = np.arange(SIDE)[:, None] + np.arange(r)  # blocks of each context
        x = x[:, around][:, :, :, :, around]  # [B, 8, r, h', 8, r, w', C]
        x = x.transpose(0, 1, 4, 2, 3, 5, 6, 7)
        return x.reshape(*x.shape[:3], r * height, r * width, x.shape[-1])


def check_map(x: Array) -> None:
    """Raise a ValueError unless a map can be cut into 8 x 8 windows."""
    if any(side % SIDE for side in x.shape[1:3]):
        raise ValueError(
            f"x: got a map of {x.shape[1:3]}, want sides that are multiples of {SIDE}; of images, "
            f"multiples of {SIDE} times the map's stride"
        )


def _shifted_copies(x: Array, ratio: int, size: int, axis: int) -> Array:
    """Strips from the inside of the map at both of its ends, for windows of `size` cells."""
    near, far = (ratio + 1) * size // 2, ratio * size
    length = x.shape[axis]
    if far > length:
        raise ValueError(f"ratio = {ratio}: want {SIDE} at most, the windows of a side")
    take = [slice(None)] * x.ndim

    def strip(start: int, stop: int) -> Array:
        take[axis] = slice(start, stop)
        return x[tuple(take)]

    return jnp.concatenate([strip(near, far), x, strip(length - far, length - near)], axis)
