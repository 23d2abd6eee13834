"""Regions of pictures. Trees, patches and merging are also compared with the official ones, in
tests/parity.
"""

import numpy as np
import pytest

from zoo.processors import crops
from zoo.processors.tiling import Box


@pytest.mark.parametrize("size", [(64, 64), (300, 50), (40, 257), (97, 61), (17, 1)])
@pytest.mark.parametrize("parts", [4, 9, 16])
def test_children_cover_their_region(size, parts):
    tree = crops.region_tree(size, smallest=16, parts=parts)
    for number, node in enumerate(tree):
        if node.children:
            covered = np.zeros(size, int)
            for child in node.children:
                box = tree[child].box
                assert tree[child].parent == number and tree[child].depth == node.depth + 1
                covered[box.top : box.bottom, box.left : box.right] += 1
            inside = covered[node.box.top : node.box.bottom, node.box.left : node.box.right]
            assert (inside == 1).all() and covered.sum() == inside.size
        else:
            assert max(node.box.size) < 16


@pytest.mark.parametrize(
    ("size", "parts", "grid"),
    [
        ((10, 10), 4, (2, 2)),
        ((20, 10), 4, (4, 1)),
        ((10, 20), 4, (1, 4)),
        ((10, 19), 4, (2, 2)),
        ((10, 10), 9, (3, 3)),
        ((30, 10), 9, (4, 2)),
        ((10, 30), 16, (2, 8)),
        ((10, 12), 16, (4, 4)),
    ],
)
def test_grids(size, parts, grid):
    assert crops.split_grid(size, parts) == grid


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match="parts = 2"):
        crops.region_tree((9, 9), smallest=16, parts=2)
    with pytest.raises(ValueError, match="at least one pixel"):
        crops.region_tree((0, 9), smallest=16)
    with pytest.raises(ValueError, match="got none"):
        crops.union([])


def test_quarters_of_odd_sides():
    parts = crops.quarters(Box(10, 20, 17, 25))
    assert parts == (
        Box(10, 20, 13, 22),
        Box(13, 20, 16, 22),
        Box(10, 22, 13, 24),
        Box(13, 22, 16, 24),
    )


def test_frame():
    picture = np.zeros((20, 30, 3), np.uint8)
    framed, [box] = crops.framed(picture, [Box(5, 5, 10, 10)], "red", 2)
    assert box == Box(3, 3, 12, 12) and not picture.any()
    assert (framed[3:5, 3:12] == (255, 0, 0)).all() and not framed[5:10, 5:10].any()
    _, [corner] = crops.framed(picture, [Box(0, 25, 4, 30)], "red", 2)
    assert corner == Box(0, 23, 6, 30)


def test_blocks_side_by_side():
    blocks = np.full((4, 4, 3), 1, np.uint8), np.full((4, 4, 3), 2, np.uint8)
    canvas = crops.side_by_side(blocks, 2, (9, 9, 9))
    assert canvas.shape == (8, 8, 3)
    assert np.flatnonzero(canvas[:, 0, 0] == 1).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(canvas[:, 7, 0] == 2).tolist() == [3, 4, 5, 6]
    far = crops.side_by_side(blocks, 100, (9, 9, 9))
    assert (far == 1).sum() == (far == 2).sum() == 48


def test_mean_is_rounded_down():
    pictures = [np.full((1, 1, 3), value, np.uint8) for value in (254, 255)]
    assert crops.mean_picture(pictures).tolist() == [[[254] * 3]]
