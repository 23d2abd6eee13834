"""A picture at several scales, each cut into blocks of one size.

The finest level is the picture itself, every other one has half the size of the one before, and the
coarsest a longer side of about `base` pixels. A level is fitted to its blocks: resized, its ratio
kept, so that it reaches the end of the last row or column of blocks; zeros fill the rest at the
right and the bottom.

Follows: arXiv:2503.07588 (the dynamic image pyramid of LRS-VQA).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.processors.lengths import bucket
from zoo.processors.tiling import NEWLINE, Size, linear_taps


@dataclass(frozen=True)
class Level:
    """One scale of a picture.

    Attributes:
      size: to which the picture is resized.
      blocks: rows and columns of blocks.
    """

    size: Size
    blocks: Size


def fitted(size: Size, scale: float, block: int) -> Level:
    """A picture of `size` at a scale, fitted to its blocks."""
    scaled = [max(1, round(length * scale)) for length in size]
    counts = [math.ceil(length / block) for length in scaled]
    fit = min(count * block / length for count, length in zip(counts, scaled, strict=True))
    height, width = (max(1, round(length * fit)) for length in scaled)
    return Level((height, width), (math.ceil(height / block), math.ceil(width / block)))


def pyramid(size: Size, *, block: int = 336, base: int = 1008) -> tuple[Level, ...]:
    """The levels of a picture, the coarsest first.

    Args:
      size: of the picture.
      block: side of a block.
      base: the longer side of the coarsest level before it is fitted; a smaller picture has one
        level, its own size.

    Raises:
      ValueError: a picture without pixels, or no positive sides.
    """
    if min(size) < 1 or block < 1 or base < 1:
        raise ValueError(
            f"size = {tuple(size)}, block = {block}, base = {base}: want a picture of at least one "
            "pixel and sides from 1 on"
        )
    least, scale, scales = min(base / max(size), 1.0), 1.0, []
    while scale >= least:
        scales.append(scale)
        scale /= 2
    if scales[-1] > least:
        scales.append(least)
    return tuple(fitted(size, scale, block) for scale in reversed(scales))


def thumbnail(size: Size, *, block: int = 336) -> Level:
    """The whole picture in one block."""
    return fitted(size, min(block / length for length in size), block)


def blocks_of(picture: np.ndarray, level: Level, block: int) -> np.ndarray:
    """A picture [H, W, C] float32 as the blocks [rows, columns, block, block, C] of a level,
    resized bilinearly as torch does without antialiasing.
    """
    top, bottom, down = linear_taps(picture.shape[0], level.size[0])
    left, right, across = linear_taps(picture.shape[1], level.size[1])
    down, across = down[:, None, None], across[None, :, None]
    lines = picture[top] * (1 - down) + picture[bottom] * down
    resized = lines[:, left] * (1 - across) + lines[:, right] * across
    (rows, columns), channels = level.blocks, picture.shape[-1]
    canvas = np.zeros((rows * block, columns * block, channels), np.float32)
    canvas[: level.size[0], : level.size[1]] = resized
    cut = canvas.reshape(rows, block, columns, block, channels)
    return np.ascontiguousarray(cut.swapaxes(1, 2))


def covered(size: Size, grid: Size) -> Size:
    """How many rows and columns of a grid of tokens a picture of `size` covers, which lies at its
    upper left and reaches its end in one direction; at least one.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return max(1, int(height * (columns / width))), columns
    return rows, max(1, int(width * (rows / height)))


def read_rows(blocks: Size, size: Size, side: int) -> np.ndarray:
    """The tokens of a level in reading order, those that cover no picture left out, with a
    `NEWLINE` after every row: int32 [n].

    Args:
      blocks: rows and columns.
      size: of the picture, at any scale.
      side: rows and columns of the tokens of a block; token `(b * side + r) * side + c` stands at
        row r and column c of block b.
    """
    whole = (blocks[0] * side, blocks[1] * side)
    block = np.arange(blocks[0] * blocks[1]).reshape(blocks[0], 1, blocks[1], 1)
    inside = np.arange(side * side).reshape(1, side, 1, side)
    rows, columns = covered(size, whole)
    tokens = (block * side * side + inside).reshape(whole)[:rows, :columns]
    return np.pad(tokens, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel().astype(np.int32)


def pyramid_batch(
    pictures: Sequence[np.ndarray], *, block: int = 336, base: int = 1008, side: int = 12
) -> dict[str, np.ndarray]:
    """What a model that reads pictures from coarse to fine sees of them, one in each row.

    Args:
      pictures: [H, W, C] float32, normalised, of any sizes.
      block: side of a tile in pixels.
      base: see `pyramid`.
      side: rows and columns of the tokens of a tile of a level; the whole picture has four times as
        many tokens.

    Returns:
      pixels [B, 1 + M, block, block, C], the whole picture and the tiles of the coarsest level;
      crops [B, 1, V, block, block, C], those of the next one (the same where there is no other),
      and their rows and columns, view_grid [B, 1, 2]; and for both levels `sizes` [B, 1] and
      `layout` [B, S], called `fine_sizes` and `fine_layout` for the second: which vision tokens
      stand in the image slots, those of the whole picture, then a separator, then the level's.
      Numbers of tiles and slots are rounded up so that few shapes occur.
    """
    rows = []
    for picture in pictures:
        size: Size = picture.shape[:2]
        levels = pyramid(size, block=block, base=base)
        chosen = {"": levels[0], "fine_": levels[min(1, len(levels) - 1)]}
        small = blocks_of(picture, thumbnail(size, block=block), block)[0, 0]
        # The official code takes the proportions of the picture for one level and those of the
        # resized one for the other.
        shapes = {"": size, "fine_": chosen["fine_"].size}
        reads = {n: read_rows(v.blocks, shapes[n], side) for n, v in chosen.items()}
        tiles = {n: blocks_of(picture, level, block) for n, level in chosen.items()}
        rows.append((small, tiles, reads))
    whole, channels = 4 * side * side, pictures[0].shape[-1]
    shape = (block, block, channels)
    batch: dict[str, np.ndarray] = {}
    for name in ("", "fine_"):
        tiles = [row[1][name].reshape(-1, *shape) for row in rows]
        most = bucket(max(map(len, tiles)))
        slots = whole + 1 + bucket(max(len(row[2][name]) for row in rows))
        stacked = np.zeros((len(rows), most, *shape), np.float32)
        layout = np.zeros((len(rows), slots), np.int32)
        sizes = np.zeros((len(rows), 1), np.int32)
        for b, (row, cut) in enumerate(zip(rows, tiles, strict=True)):
            stacked[b, : len(cut)] = cut
            newline = most * side * side
            cells = np.where(row[2][name] == NEWLINE, newline, row[2][name]) + whole
            line = np.concatenate([np.arange(whole), [whole + newline + 1], cells])
            layout[b, : len(line)], sizes[b] = line, len(line)
        batch |= {f"{name}layout": layout, f"{name}sizes": sizes}
        if name:
            batch["crops"] = stacked[:, None]
            grids = [row[1][name].shape[:2] for row in rows]
            batch["view_grid"] = np.array(grids, np.int32)[:, None]
        else:
            small = np.stack([row[0] for row in rows])[:, None]
            batch["pixels"] = np.concatenate([small, stacked], 1)
    return batch
