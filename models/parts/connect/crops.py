"""Crops of a picture: their tokens, put together again and dealt out to groups that line up with
those of the whole picture.

Follows: arXiv:2406.04334.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, take

Sampling = Literal["2d", "1d", "grid"]
"""How the map of all crops becomes groups: `2d` takes every h-th row and w-th column, `1d` every
h w-th token in reading order, `grid` one crop after the other.
"""


@dataclass(frozen=True)
class Crops:
    """What a model sees of a picture besides the whole.

    Attributes:
      number: V, crops at most.
      square: the picture is always cut into a square grid of `number` crops; by default into the
        grid that suits its proportions best.
    """

    number: int = 4
    square: bool = False

    def __post_init__(self) -> None:
        if self.number < 2 or (self.square and self.side is None):
            kind = "a square number of " if self.square else ""
            raise ValueError(f"{self.number} crops: want {kind}2 or more")

    @property
    def side(self) -> int | None:
        """Rows and columns of the square grid; None where the number is none."""
        side = math.isqrt(self.number)
        return side if side**2 == self.number else None


def default_grid(crops: Crops) -> Array:
    """The square grid, int32 [2], for batches that do not say how pictures were cut.

    Raises:
      ValueError: the crops make no square.
    """
    if crops.side is None:
        raise ValueError(
            f"{crops.number} crops are no square: want the rows and columns of every picture's "
            "crops in the batch's view_grid [B, M, 2]"
        )
    return jnp.full((2,), crops.side, jnp.int32)


def present(grid: Array, groups: int) -> Array:
    """Which groups there are: int [..., 2], rows and columns of crops, to bool [..., G]."""
    there: Array = jnp.arange(groups) < (grid[..., 0] * grid[..., 1])[..., None]
    return there


def deal(
    tokens: Array, grid: Array, *, side: tuple[int, int], groups: int, sampling: Sampling
) -> Array:
    """Deal the tokens of crops out to groups of N, each of which covers the whole picture.

    With `2d`, token t of every group shows the same neighbourhood as token t of the picture seen
    whole. Group i w + j holds the rows i, i + h, ... and the columns j, j + w, ... of the map.

    Args:
      tokens: [..., V, N, C], the crops row by row; those from h w on are not read.
      grid: int [..., 2], rows h and columns w of the crops.
      side: rows and columns of the N tokens of one crop.
      groups: G; those from h w on are zeros.
      sampling: how.

    Returns:
      [..., G, N, C].
    """
    *lead, views, n, width = tokens.shape
    rows, columns = side
    grid = jnp.broadcast_to(grid, (*lead, 2))
    h, w = (jnp.maximum(grid[..., i], 1)[..., None, None] for i in range(2))  # [..., 1, 1]
    group, token = jnp.arange(groups)[:, None], jnp.arange(n)  # [G, 1], [N]
    if sampling == "2d":
        y, x = token // columns * h + group // w, token % columns * w + group % w
    else:
        place = token * h * w + group
        y, x = place // (w * columns), place % (w * columns)
    crop, inside = y // rows * w + x // columns, y % rows * columns + x % columns
    if sampling == "grid":
        crop, inside = jnp.broadcast_arrays(group, token)
    index = jnp.clip(crop * n + inside, 0, views * n - 1)
    index = jnp.broadcast_to(index, (*lead, groups, n)).reshape(-1, groups * n)
    dealt = take(tokens.reshape(-1, views * n, width), index).reshape(*lead, groups, n, width)
    found: Array = jnp.where(present(grid, groups)[..., None, None], dealt, 0)
    return found


def join_views(whole: Array, crops: Array, wanted: Crops) -> Array:
    """Pictures [B, M, H, W, 3] and their crops [B, M, V, H, W, 3] as [B, M, 1 + V, H, W, 3].

    Raises:
      ValueError: crops of another number, of another size, or of other pictures.
    """
    want = (*whole.shape[:2], wanted.number, *whole.shape[2:])
    if crops.shape != want:
        raise ValueError(f"crops: got {crops.shape}, want [B, M, V, height, width, 3] = {want}")
    return jax.lax.concatenate([whole[:, :, None], crops.astype(whole.dtype)], 2)
