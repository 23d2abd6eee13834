"""Regions of a picture: trees of crops, boxes that are grown and merged, and views of them.

A region is a `Box` in pixels. Nothing here asks a model; what is done with a region is for the
agents that search pictures.

Follows: arXiv:2411.16044 (the tree, the patches and their merging), arXiv:2408.15556 (quarters and
their mean).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from zoo.processors.tiling import Box, Size

SMALLEST = 16
"""Regions are not cut below this side, where strips would have no pixels."""

_GRIDS = {4: ((4, 1), (2, 2)), 9: ((4, 2), (3, 3)), 16: ((8, 2), (4, 4))}
"""Rows and columns of the parts of a region at least twice as tall as wide, and of all others; of
one that is at least twice as wide as tall, the first pair the other way round."""


@dataclass(frozen=True)
class Region:
    """A node of a tree of crops.

    Attributes:
      box: what it shows.
      depth: 0 for the whole picture.
      parent: number of the node that it is a part of, -1 for the whole picture.
      children: numbers of its parts; none for a leaf.
    """

    box: Box
    depth: int
    parent: int
    children: tuple[int, ...] = ()


def split_grid(size: Size, parts: int = 4) -> Size:
    """Rows and columns into which a region of `size` is cut.

    Raises:
      ValueError: another number of parts than 4, 9 and 16.
    """
    if parts not in _GRIDS:
        raise ValueError(f"parts = {parts}: want one of {', '.join(map(str, _GRIDS))}")
    (longer, shorter), square = _GRIDS[parts]
    height, width = size
    if height >= 2 * width:
        return longer, shorter
    return (shorter, longer) if 2 * height <= width else square


def cut_box(box: Box, grid: Size) -> list[Box]:
    """The parts of a box, row by row; the last row and column take the rest, and those without any
    pixel are left out.
    """
    (rows, columns), (height, width) = grid, box.size
    down, across = height // rows, width // columns
    tops = [box.top + down * i for i in range(rows)] + [box.bottom]
    lefts = [box.left + across * i for i in range(columns)] + [box.right]
    found = [
        Box(tops[i], lefts[j], tops[i + 1], lefts[j + 1])
        for i in range(rows)
        for j in range(columns)
    ]
    return [part for part in found if min(part.size) > 0]


def region_tree(size: Size, *, smallest: int, parts: int = 4) -> tuple[Region, ...]:
    """A picture cut into parts, these into parts, ... until both sides are less than `smallest`.

    The nodes are numbered as they are made: all parts of a node, then the parts of the first of
    them. Node 0 is the whole picture.

    Args:
      size: of the picture.
      smallest: a region with a side of so many pixels is cut.
      parts: 4, 9 or 16; see `split_grid`.

    Raises:
      ValueError: a picture without pixels, `smallest` below `SMALLEST`, or other `parts`.
    """
    if min(size) < 1 or smallest < SMALLEST:
        raise ValueError(
            f"size = {tuple(size)}, smallest = {smallest}: want a picture of at least one pixel "
            f"and regions of at least {SMALLEST}"
        )
    split_grid(size, parts)
    nodes = [Region(Box(0, 0, *size), 0, -1)]
    todo = [0]
    while todo:
        number = todo.pop()
        node = nodes[number]
        if max(node.box.size) < smallest:
            continue
        boxes = cut_box(node.box, split_grid(node.box.size, parts))
        children = tuple(range(len(nodes), len(nodes) + len(boxes)))
        nodes[number] = Region(node.box, node.depth, node.parent, children)
        nodes += [Region(box, node.depth + 1, number) for box in boxes]
        todo += reversed(children)
    return tuple(nodes)


def patch_around(box: Box, size: Size, *, side: int, scale: float | None = None) -> Box:
    """The part of a picture around a region that a model is shown: at least `side` pixels wide and
    tall, larger by `scale`, with the region in its middle where the picture's edges allow it.

    Args:
      box: the region.
      size: of the picture.
      side: in pixels, that of the model's input.
      scale: factor of both sides; None for 1.
    """
    wanted = [max(length, side) for length in box.size]
    if scale is not None:
        wanted = [int(length * scale) for length in wanted]
    middle = [int(start + length / 2) for start, length in zip(box[:2], box.size, strict=True)]
    top, left = (max(0, m - length // 2) for m, length in zip(middle, wanted, strict=True))
    return Box(top, left, min(top + wanted[0], size[0]), min(left + wanted[1], size[1]))


def grown(box: Box, margin: int) -> Box:
    """The box with `margin` more pixels on every side, beyond the picture if need be."""
    return Box(box.top - margin, box.left - margin, box.bottom + margin, box.right + margin)


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes have pixels in common."""
    return max(a.top, b.top) < min(a.bottom, b.bottom) and max(a.left, b.left) < min(
        a.right, b.right
    )


def contains(outer: Box, inner: Box) -> bool:
    """Whether all of `inner` is in `outer`."""
    return (
        outer.top <= inner.top
        and outer.left <= inner.left
        and outer.bottom >= inner.bottom
        and outer.right >= inner.right
    )


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of them. Raises ValueError if there is none."""
    if not boxes:
        raise ValueError("boxes: got none, want at least one")
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return Box(min(tops), min(lefts), max(bottoms), max(rights))


def merge_near(boxes: Sequence[Box], margin: int = 50) -> list[Box]:
    """Boxes that overlap once `margin` is put around both become one, again and again, pair by pair
    in their order.
    """
    found, changed = list(boxes), True
    while changed:
        changed, used, merged = False, set(), []
        for i, box in enumerate(found):
            if i in used:
                continue
            near = (
                j
                for j, other in enumerate(found)
                if j != i and j not in used and overlap(grown(box, margin), grown(other, margin))
            )
            j = next(near, None)
            if j is not None:
                used |= {i, j}
                changed, box = True, union([box, found[j]])
            merged.append(box)
        found = merged
    return found


def crop(picture: np.ndarray, box: Box) -> np.ndarray:
    """The pixels of a box that lie in the picture [H, W, C]."""
    return picture[max(0, box.top) : box.bottom, max(0, box.left) : box.right]


def framed(
    picture: np.ndarray, boxes: Sequence[Box], colour: str, thickness: int
) -> tuple[np.ndarray, list[Box]]:
    """A picture [H, W, 3] uint8 with frames around regions.

    Args:
      picture: to draw on; it stays as it is.
      boxes: the regions, which the frames do not cover but at the picture's edges.
      colour: a name or a code that Pillow knows.
      thickness: of the frames in pixels.

    Returns:
      the picture, and the boxes with their frames as far as they are in it.
    """
    canvas = Image.fromarray(picture)
    pen, outer = ImageDraw.Draw(canvas), []
    for box in boxes:
        top, left, bottom, right = grown(box, thickness)
        box = Box(max(0, top), max(0, left), min(canvas.height, bottom), min(canvas.width, right))
        pen.rectangle((box.left, box.top, box.right, box.bottom), outline=colour, width=thickness)
        outer.append(box)
    return np.asarray(canvas), outer


def side_by_side(
    blocks: tuple[np.ndarray, np.ndarray], rise: int, colour: tuple[int, ...]
) -> np.ndarray:
    """Two square blocks [s, s, C] beside each other on a canvas [2 s, 2 s, C] of `colour`.

    Args:
      blocks: left and right.
      rise: how many pixels the right one lies below the left one, cut to -s to s.
      colour: of the canvas.
    """
    side = blocks[0].shape[0]
    rise = int(np.clip(rise, -side, side))
    canvas = np.full((2 * side, 2 * side, blocks[0].shape[2]), colour, blocks[0].dtype)
    for number, (block, top) in enumerate(
        zip(blocks, (side // 2 - rise // 2, side // 2 + rise // 2), strict=True)
    ):
        first, last = max(0, top), min(2 * side, top + side)
        canvas[first:last, number * side : (number + 1) * side] = block[first - top : last - top]
    return canvas


def quarters(box: Box) -> tuple[Box, ...]:
    """Four parts of equal size: top left, bottom left, top right, bottom right. The last row and
    column of an odd side belong to none.
    """
    height, width = box.size[0] // 2, box.size[1] // 2
    return tuple(
        Box(top, left, top + height, left + width)
        for left in (box.left, box.left + width)
        for top in (box.top, box.top + height)
    )


def mean_picture(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of pictures [H, W, C] uint8 of one size, pixel by pixel, rounded down."""
    return np.mean(np.stack(pictures), axis=0).astype(np.uint8)


def depth_of(tree: Sequence[Region]) -> int:
    """The greatest depth of its nodes."""
    return max(node.depth for node in tree)
