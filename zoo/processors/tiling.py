"""How pictures of any shape become square tiles, and in which order their vision tokens are read.

All of it is arithmetic on sizes; nothing here touches a pixel. The tower encodes every tile to a
grid of Q = h w tokens. A `Reading` says, for one image (or video), how many tiles there are and
which of their tokens are read, in which order, with a learned newline vector between the rows
where a model has one. `pack` turns the readings of a batch into the arrays `sizes`, `tiles`,
`layout` and `blend` that a batch carries (see `zoo.models.core.types`), and `stack_tiles` the tiles
into `pixels`.

    readings = [[anyres(size, resolutions, tile=336, grid=(24, 24))] for size in sizes]
    batch = {**pack(readings, tokens=576), "pixels": stack_tiles(tiles), ...}

Sizes are (height, width) everywhere, as are grids (rows, columns).

Follows: arXiv:2310.03744 (LLaVA-1.5), arXiv:2408.03326 (LLaVA-OneVision, whose anyres is that of
LLaVA-NeXT with a limit), arXiv:2404.16821 (tiles of InternVL).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Size = tuple[int, int]

NEWLINE = -1
"""In a `Reading`: the learned newline vector."""


class Box(NamedTuple):
    """A rectangle, in pixels or in tokens; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left


@dataclass(frozen=True)
class Reading:
    """What stands in the place of one image's placeholder.

    Attributes:
      tiles: number of tiles, in the order in which they stand in `pixels`.
      index: int32 [n]: token `tile * Q + row * w + column` of the image's own tiles, or `NEWLINE`;
        int32 [n, 4] where tokens are interpolated.
      weight: float32 [n, 4], the weights of the four; None with an `index` [n].
      mosaic: rows and columns of the grid that the tiles behind the first make together; zeros
        where they make none.
    """

    tiles: int
    index: np.ndarray
    weight: np.ndarray | None = None
    mosaic: Size = (0, 0)

    @property
    def size(self) -> int:
        """Number of vision tokens that the decoder sees for this image."""
        return len(self.index)


# Tiles of LLaVA-NeXT and LLaVA-OneVision: a picture is fitted into one of a few resolutions.


def select_best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps the most of a picture's pixels and, among those, wastes the fewest.

    Args:
      size: of the picture.
      resolutions: the choices; the first one wins a tie.

    Raises:
      ValueError: no resolutions, or a picture without pixels.
    """
    height, width = size
    if height < 1 or width < 1 or not resolutions:
        raise ValueError(
            f"size = {tuple(size)} among {len(resolutions)} resolutions: want a picture of at "
            "least one pixel and at least one resolution"
        )

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    best = max(resolutions, key=merit)
    return int(best[0]), int(best[1])


def fitted_box(size: Size, resolution: Size) -> Box:
    """Where a picture of `size` lies after it was resized into `resolution`, ratio kept, centred.

    Its `size` is what the picture is resized to; all around it are zeros (black).
    """
    (height, width), (rows, columns) = size, resolution
    across, down = columns / width, rows / height
    if across < down:
        fitted = (min(math.ceil(height * across), rows), columns)
    else:
        fitted = (rows, min(math.ceil(width * down), columns))
    top, left = (rows - fitted[0]) // 2, (columns - fitted[1]) // 2
    return Box(top, left, top + fitted[0], left + fitted[1])


def tile_boxes(resolution: Size, tile: int) -> list[Box]:
    """The square tiles of side `tile` that cover `resolution`, row by row."""
    return [
        Box(top, left, top + tile, left + tile)
        for top in range(0, resolution[0], tile)
        for left in range(0, resolution[1], tile)
    ]


def crop_grid(size: Size, *, tile: int, crops: int, square: bool = False) -> Size:
    """Rows and columns of the crops into which a picture is stretched and cut for a closer look.

    Of all grids of 2 to `crops` crops, the one that `select_best_resolution` finds for the picture.

    Args:
      size: of the picture.
      tile: side of a crop in pixels.
      crops: how many at most.
      square: take the square grid of `crops` crops, whatever the picture is.

    Raises:
      ValueError: fewer than two crops, or a square that `crops` do not make.
    """
    side = math.isqrt(crops)
    if crops < 2 or (square and side**2 != crops):
        kind = "a square number of " if square else ""
        raise ValueError(f"crops = {crops}: want {kind}2 or more")
    if square:
        return side, side
    grids = [
        (rows * tile, columns * tile)
        for columns in range(1, crops + 1)
        for rows in range(1, crops // columns + 1)
        if rows * columns > 1
    ]
    height, width = select_best_resolution(size, grids)
    return height // tile, width // tile


def cut(picture: np.ndarray, grid: Size) -> np.ndarray:
    """A picture [h H, w W, C] as the crops [h w, H, W, C] of a grid h x w, row by row."""
    (rows, columns), channels = grid, picture.shape[-1]
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    parts = picture.reshape(rows, height, columns, width, channels).swapaxes(1, 2)
    return parts.reshape(-1, height, width, channels)


def stack_crops(
    rows: Sequence[Sequence[tuple[np.ndarray, Size]]], *, crops: int, num_images: int = 0
) -> dict[str, np.ndarray]:
    """The batch arrays of the crops of every row's images.

    Args:
      rows: crops [n, H, W, C] and their grid, for the images of every example; at least one in all.
      crops: V, the most of one image.
      num_images: M, images of every row; at least the most that a row has.

    Returns:
      crops float32 [B, M, V, H, W, C] and view_grid int32 [B, M, 2], with zeros and ones where
      there are fewer.
    """
    shape = next(parts.shape[1:] for row in rows for parts, _ in row)
    images = max([num_images, *map(len, rows)])
    pixels = np.zeros((len(rows), images, crops, *shape), np.float32)
    grids = np.ones((len(rows), images, 2), np.int32)
    for b, row in enumerate(rows):
        for i, (parts, grid) in enumerate(row):
            pixels[b, i, : len(parts)], grids[b, i] = parts, grid
    return {"crops": pixels, "view_grid": grids}


def unpadded_box(size: Size, grid: Size) -> Box:
    """The part of a grid of tokens that a picture of `size` covers when it lies in its middle.

    As much is cut on one side as on the other, so a token more than needed may stay.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return Box(cut, 0, rows - cut, columns)
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return Box(0, cut, rows, columns - cut)


def anyres(
    size: Size,
    resolutions: Sequence[Size],
    *,
    tile: int,
    grid: Size,
    max_tiles: int | None = None,
) -> Reading:
    """A picture as LLaVA-NeXT and LLaVA-OneVision read it.

    Tile 0 is the whole picture, resized to one tile; the others are the tiles of the picture fitted
    into its best resolution (`fitted_box`, `tile_boxes`). All tokens of tile 0 are read first, then
    the rows of the grid that the other tiles make together, without those that cover padding only,
    and a newline after every row.

    Args:
      size: of the picture.
      resolutions: the choices, multiples of `tile`.
      tile: side of a tile in pixels.
      grid: tokens of one tile.
      max_tiles: with more tokens than 1.1^2 * `max_tiles` tiles have, the grid is reduced to about
        that many by bilinear interpolation (the 9 of `anyres_max_9`); None never reduces.
    """
    resolution = select_best_resolution(size, resolutions)
    down, across = resolution[0] // tile, resolution[1] // tile
    rows, columns = grid
    whole = (down * rows, across * columns)
    box = unpadded_box(size, whole)
    flat = 1 + np.arange(down * across).reshape(down, 1, across, 1)  # the tile of every token
    flat = flat * (rows * columns) + np.arange(rows * columns).reshape(1, rows, 1, columns)
    flat = flat.reshape(whole)[box.top : box.bottom, box.left : box.right].astype(np.int32)

    ratio = 0.0 if max_tiles is None else math.sqrt(flat.size / (max_tiles * rows**2))
    first = np.arange(rows * columns, dtype=np.int32)
    if ratio <= 1.1:
        lines = np.pad(flat, ((0, 0), (0, 1)), constant_values=NEWLINE)
        index = np.concatenate([first, lines.reshape(-1)])
        return Reading(1 + down * across, index, mosaic=(down, across))
    index, weight = _bilinear(flat, (int(box.size[0] // ratio), int(box.size[1] // ratio)))
    index = np.pad(index, ((0, 0), (0, 1), (0, 0)), constant_values=NEWLINE).reshape(-1, 4)
    weight = np.pad(weight, ((0, 0), (0, 1), (0, 0))).reshape(-1, 4)
    index, weight = (np.concatenate(pair) for pair in zip(_single(first), (index, weight)))
    weight[index[:, 0] == NEWLINE, 0] = 1
    return Reading(1 + down * across, index, weight, (down, across))


# Other readings.


def whole_tiles(tiles: int, tokens: int, *, newline: bool = False) -> Reading:
    """All tokens of all tiles, one tile after the other, as LLaVA-1.5 (one) and InternVL read them.

    Args:
      tiles: how many.
      tokens: of each tile.
      newline: one newline at the end, as LLaVA-OneVision has it when a prompt has several pictures,
        each of which is one tile then.
    """
    index = np.arange(tiles * tokens, dtype=np.int32)
    return Reading(tiles, np.append(index, np.int32(NEWLINE)) if newline else index)


def pooled_frames(frames: int, grid: Size) -> Reading:
    """A video as LLaVA-OneVision reads it: every frame is a tile, whose grid is halved (rounded up)
    by bilinear interpolation; one newline at the end.
    """
    rows, columns = grid
    tokens = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    index, weight = _bilinear(tokens, (-(-rows // 2), -(-columns // 2)))
    each, weight = index.reshape(1, -1, 4), weight.reshape(-1, 4)
    start = np.arange(frames, dtype=np.int32).reshape(-1, 1, 1) * (rows * columns)
    newline = np.full((1, 4), NEWLINE, np.int32), np.eye(1, 4, dtype=np.float32)
    index = np.concatenate([(start + each).reshape(-1, 4), newline[0]])
    return Reading(frames, index, np.concatenate([np.tile(weight, (frames, 1)), newline[1]]))


def _single(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] that are not interpolated, as index and weight [n, 4]."""
    weight = np.zeros((len(index), 4), np.float32)
    weight[:, 0] = 1
    return np.repeat(index[:, None], 4, 1), weight


def _bilinear(tokens: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """The four neighbours of every token of a grid [h, w] that is resized to `size`, and their
    weights, both [*size, 4], with half-pixel centres and clamped edges, as torch's `interpolate`
    without antialiasing.
    """
    top, bottom, down = linear_taps(tokens.shape[0], size[0])
    left, right, across = linear_taps(tokens.shape[1], size[1])
    index = [tokens[np.ix_(y, x)] for y in (top, bottom) for x in (left, right)]
    weight = [np.outer(v, u) for v in (1 - down, down) for u in (1 - across, across)]
    return np.stack(index, -1), np.stack(weight, -1).astype(np.float32)


def linear_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours of each of `new` places among `old` ones, and the weight of the second,
    [new] each: one axis of `_bilinear`.
    """
    step = np.float32(old) / np.float32(new)
    centre = step * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    centre = np.maximum(centre, 0)
    low = np.minimum(centre.astype(np.int32), old - 1)
    return low, np.minimum(low + 1, old - 1), centre - low


# Tiles of InternVL: the grid of tiles whose shape is nearest to that of the picture.


def tile_grid(size: Size, *, tile: int, min_tiles: int = 1, max_tiles: int = 12) -> Size:
    """Rows and columns of the tiles that InternVL resizes a picture to, its ratio not kept.

    Of all grids of `min_tiles` to `max_tiles` tiles, the one whose ratio of width to height is
    nearest; among equals a larger one, as long as the picture has more than half its pixels.
    A grid of more than one tile is followed by a thumbnail, one more tile (`num_tiles`).
    """
    height, width = size
    sides = range(1, max_tiles + 1)
    grids = [(r, c) for c in sides for r in sides if min_tiles <= r * c <= max_tiles]
    best, nearest = (1, 1), math.inf
    for rows, columns in sorted(grids, key=math.prod):
        distance = abs(width / height - columns / rows)
        enough = height * width > 0.5 * tile * tile * rows * columns
        if distance < nearest or (distance == nearest and enough):
            best, nearest = (rows, columns), distance
    return best


def num_tiles(grid: Size) -> int:
    """Tiles of a picture that is cut into `grid`, with the thumbnail that follows them."""
    return math.prod(grid) + (math.prod(grid) > 1)


# Batches.


def pack(
    rows: Sequence[Sequence[Reading]],
    *,
    tokens: int,
    num_images: int = 0,
    num_tiles: int = 0,
    num_slots: int = 0,
) -> dict[str, np.ndarray]:
    """The batch arrays that say where the vision tokens of a batch go.

    Args:
      rows: the readings of every example, in the order of their placeholders; may be empty.
      tokens: Q, tokens of one tile.
      num_images: I, placeholders of every row; at least the most that a row needs. More bounds
        the number of different shapes.
      num_tiles: M, tiles of every row; likewise.
      num_slots: S, vision tokens of every row; likewise.

    Returns:
      sizes int32 [B, I], 0 for placeholders that a row does not use; tiles int32 [B, I, 3], see
      `zoo.models.core.types`; layout int32 [B, S], or [B, S, 4] with blend float32 [B, S, 4] where
      an image is interpolated, with zeros in surplus slots. A newline is token M Q. Without any
      image, an empty dict: the batch is text only.
    """
    images = max([num_images, *(len(row) for row in rows)])
    tiles = max([num_tiles, *(sum(r.tiles for r in row) for row in rows)])
    slots = max([num_slots, *(sum(r.size for r in row) for row in rows)])
    if not images:
        return {}
    blended = any(reading.weight is not None for row in rows for reading in row)
    sizes = np.zeros((len(rows), images), np.int32)
    cut = np.zeros((len(rows), images, 3), np.int32)
    layout = np.zeros((len(rows), slots, 4), np.int32)
    blend = np.zeros((len(rows), slots, 4), np.float32)
    for b, row in enumerate(rows):
        tile = slot = 0
        for i, reading in enumerate(row):
            index, weight = reading.index, reading.weight
            if weight is None:
                index, weight = _single(index)
            where = slice(slot, slot + reading.size)
            layout[b, where] = np.where(index == NEWLINE, tiles * tokens, index + tile * tokens)
            blend[b, where], sizes[b, i] = weight, reading.size
            cut[b, i] = reading.tiles, *reading.mosaic
            tile, slot = tile + reading.tiles, slot + reading.size
    if blended:
        return {"sizes": sizes, "tiles": cut, "layout": layout, "blend": blend}
    return {"sizes": sizes, "tiles": cut, "layout": layout[..., 0]}


def stack_tiles(rows: Sequence[Sequence[np.ndarray]], *, num_tiles: int = 0) -> np.ndarray:
    """Pixels float32 [B, M, H, W, C] from the images of every row, each [tiles, H, W, C].

    Rows with fewer tiles than M end in zeros.

    Args:
      rows: images of every example; at least one image in all.
      num_tiles: M, at least the most that a row has; as in `pack`.
    """
    shape = next(image.shape[1:] for row in rows for image in row)
    most = max([num_tiles, *(sum(len(image) for image in row) for row in rows)])
    pixels = np.zeros((len(rows), most, *shape), np.float32)
    for b, row in enumerate(rows):
        if row:
            together = np.concatenate(list(row))
            pixels[b, : len(together)] = together
    return pixels


def pad_prompts(
    rows: Sequence[Sequence[int]],
    *,
    image_id: int,
    pad_id: int,
    num_images: int = 0,
    length: int = 0,
) -> dict[str, np.ndarray]:
    """Prompts of different lengths with different numbers of placeholders, padded on the right.

    Args:
      rows: ids of every example, one `image_id` for each of its images.
      image_id: the placeholder.
      pad_id: what stands in the padding.
      num_images: I; rows with fewer placeholders have the others in their padding.
      length: T; at least what the longest row needs with its unused placeholders.

    Returns:
      ids int32 [B, T] and text_mask bool [B, T].
    """
    found = [list(row).count(image_id) for row in rows]
    most = max([num_images, *found])
    full = max([length, *(len(row) + most - n for row, n in zip(rows, found, strict=True))])
    ids = np.full((len(rows), full), pad_id, np.int32)
    mask = np.zeros((len(rows), full), bool)
    for b, (row, n) in enumerate(zip(rows, found, strict=True)):
        ids[b, : len(row)], mask[b, : len(row)] = row, True
        ids[b, len(row) : len(row) + most - n] = image_id
    return {"ids": ids, "text_mask": mask}
