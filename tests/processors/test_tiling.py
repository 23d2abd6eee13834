"""Tiles of pictures and the order of their tokens, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from zoo.models.parts.connect.crops import Crops
from zoo.processors import tiling
from zoo.processors.pixels import Pipeline, ShortestEdge
from zoo.processors.tiling import NEWLINE
from zoo.processors.views import Single
from zoo.processors.vision import TileVision

NEXT = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


def test_resolutions():
    assert tiling.select_best_resolution((300, 500), NEXT) == (336, 672)
    assert tiling.select_best_resolution((1000, 1000), NEXT) == (672, 672)
    assert tiling.select_best_resolution((2000, 200), NEXT) == (1008, 336)
    with pytest.raises(ValueError, match="at least one"):
        tiling.select_best_resolution((0, 5), NEXT)
    with pytest.raises(ValueError, match="at least one"):
        tiling.select_best_resolution((5, 5), [])


def test_boxes():
    assert tiling.fitted_box((300, 500), (336, 672)) == (0, 56, 336, 616)
    assert tiling.fitted_box((101, 1000), (672, 672)).size == (68, 672)
    assert tiling.tile_boxes((4, 6), 2) == [
        (0, 0, 2, 2), (0, 2, 2, 4), (0, 4, 2, 6), (2, 0, 4, 2), (2, 2, 4, 4), (2, 4, 4, 6),
    ]  # fmt: skip
    assert tiling.unpadded_box((10, 20), (8, 8)) == (2, 0, 6, 8)
    assert tiling.unpadded_box((20, 11), (8, 8)) == (0, 2, 8, 6)


def test_anyres_by_hand():
    """Two tiles side by side, of 2 x 2 tokens; the picture covers all columns and all rows."""
    reading = tiling.anyres((10, 20), [(4, 8), (8, 8)], tile=4, grid=(2, 2))
    assert reading.tiles == 3 and reading.weight is None
    want = [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    np.testing.assert_array_equal(reading.index, want)


def test_anyres_without_padding():
    """A flat picture in a square of tiles: the outer rows are not read."""
    reading = tiling.anyres((10, 20), [(8, 8)], tile=4, grid=(2, 2))
    want = [0, 1, 2, 3, 6, 7, 10, 11, NEWLINE, 12, 13, 16, 17, NEWLINE]
    np.testing.assert_array_equal(reading.index, want)


def test_known_numbers_of_tokens():
    """576 + 48 rows of 48 and a newline: the 2928 of LLaVA-NeXT; 729 + 81 x 82 of OneVision."""
    square = tiling.anyres((999, 999), NEXT, tile=336, grid=(24, 24))
    assert (square.tiles, square.size) == (5, 2928)
    sizes = [(384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)]
    options = {"tile": 384, "grid": (27, 27), "max_tiles": 9}
    assert tiling.anyres((1152, 1152), sizes, **options).size == 729 + 81 * 82
    large = tiling.anyres((2304, 2304), sizes, **options)
    assert (large.tiles, large.size) == (37, 729 + 81 * 82)
    np.testing.assert_allclose(large.weight.sum(-1), 1, rtol=1e-6)


def test_pooled_frames():
    """Odd grids: neighbours by half-pixel centres; the second frame is the first, a grid on."""
    reading = tiling.pooled_frames(2, (3, 3))
    assert (reading.tiles, reading.size) == (2, 9)
    np.testing.assert_array_equal(reading.index[0], [0, 1, 3, 4])
    np.testing.assert_allclose(reading.weight[0], np.outer([0.75, 0.25], [0.75, 0.25]).ravel())
    np.testing.assert_array_equal(reading.index[4:8], reading.index[:4] + 9)
    np.testing.assert_array_equal(reading.weight[4:8], reading.weight[:4])
    assert reading.index[8, 0] == NEWLINE and reading.weight[8].tolist() == [1, 0, 0, 0]


def test_grids_of_internvl():
    """Recorded choices of the original, width first there."""
    known = {(800, 600): (4, 3), (1920, 1080): (4, 2), (3000, 400): (8, 1), (448, 448): (1, 1)}
    known |= {(1024, 1024): (3, 3), (5000, 5000): (3, 3), (900, 896): (2, 2), (1000, 333): (3, 1)}
    for (width, height), (columns, rows) in known.items():
        assert tiling.tile_grid((height, width), tile=448) == (rows, columns)
    assert [tiling.num_tiles(grid) for grid in ((1, 1), (1, 2), (3, 3))] == [1, 3, 10]


def test_packing():
    """Tokens are counted over the tiles of a row; a newline is the token after all of them."""
    two = tiling.anyres((10, 20), [(4, 8)], tile=4, grid=(2, 2))
    one = tiling.whole_tiles(1, 4, newline=True)
    batch = tiling.pack([[one, two], [], [one]], tokens=4)
    assert set(batch) == {"sizes", "tiles", "layout"}
    np.testing.assert_array_equal(batch["sizes"], [[5, 14], [0, 0], [5, 0]])
    assert batch["layout"].shape == (3, 19)
    np.testing.assert_array_equal(batch["layout"][0, :10], [0, 1, 2, 3, 16, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(batch["layout"][2, :6], [0, 1, 2, 3, 16, 0])

    roomy = tiling.pack([[one]], tokens=4, num_images=3, num_tiles=2, num_slots=8)
    np.testing.assert_array_equal(roomy["sizes"], [[5, 0, 0]])
    np.testing.assert_array_equal(roomy["layout"], [[0, 1, 2, 3, 8, 0, 0, 0]])

    mixed = tiling.pack([[one], [tiling.pooled_frames(1, (2, 2))]], tokens=4)
    assert mixed["layout"].shape == mixed["blend"].shape == (2, 5, 4)
    np.testing.assert_array_equal(mixed["blend"][0], np.eye(1, 4).repeat(5, 0))
    np.testing.assert_allclose(mixed["blend"][1, 0], 0.25)
    assert tiling.pack([[], []], tokens=4) == {}


def test_stacking_and_padding():
    tiles = np.ones((2, 3, 3, 1), np.float32)
    pixels = tiling.stack_tiles([[tiles, tiles[:1]], [tiles[:1]], []], num_tiles=4)
    np.testing.assert_array_equal(pixels.sum((2, 3, 4)), [[9, 9, 9, 0], [9, 0, 0, 0], [0] * 4])
    prompts = tiling.pad_prompts([[9, 5, 9, 6], [5, 9], [7]], image_id=9, pad_id=0)
    np.testing.assert_array_equal(prompts["ids"], [[9, 5, 9, 6], [5, 9, 9, 0], [7, 9, 9, 0]])
    np.testing.assert_array_equal(prompts["text_mask"].sum(-1), [4, 2, 1])


@pytest.mark.parametrize(
    ("size", "crops", "grid"),
    [
        ((1000, 1000), 4, (2, 2)),
        ((400, 1400), 4, (1, 4)),
        ((1400, 400), 4, (4, 1)),
        ((700, 1000), 4, (2, 2)),
        ((500, 1000), 3, (1, 2)),
        ((500, 1500), 3, (1, 3)),
        ((1000, 1000), 2, (2, 1)),  # of equals the one of fewer columns
        ((100, 100), 4, (2, 1)),  # the least that does not waste its few pixels
    ],
)
def test_crop_grid(size, crops, grid):
    assert tiling.crop_grid(size, tile=336, crops=crops) == grid


def test_crops_are_cut_row_by_row_and_stacked():
    picture = np.arange(4 * 6).reshape(4, 6, 1)
    crops = tiling.cut(picture, (2, 3))
    assert crops.shape == (6, 2, 2, 1)
    assert crops[1, ..., 0].tolist() == [[2, 3], [8, 9]]
    assert crops[3, ..., 0].tolist() == [[12, 13], [18, 19]]
    batch = tiling.stack_crops([[(crops[:2], (1, 2))], []], crops=4, num_images=2)
    assert batch["crops"].shape == (2, 2, 4, 2, 2, 1)
    assert batch["view_grid"].tolist() == [[[1, 2], [1, 1]], [[1, 1], [1, 1]]]
    np.testing.assert_array_equal(batch["crops"][0, 0, :2], crops[:2])
    assert (batch["crops"][0, 0, 2:] == 0).all() and (batch["crops"][:, 1] == 0).all()
    assert tiling.crop_grid((9, 1), tile=2, crops=9, square=True) == (3, 3)
    for wrong in ({"crops": 1}, {"crops": 3, "square": True}):
        with pytest.raises(ValueError, match="want"):
            tiling.crop_grid((9, 9), tile=2, **wrong)


def test_a_published_processor_with_crops():
    """The square that the checkpoint's processor cuts out of a picture is what is looked at closer;
    prompts with fewer pictures end in zeros.
    """
    pipeline = Pipeline(ShortestEdge(12), crop=(12, 12), scale=1.0, mean=None, std=None)
    vision = TileVision(Single(pipeline), 9, 4, (2, 2), crops=Crops(4))
    picture = np.zeros((24, 48, 3), np.uint8)
    picture[:12, 12:24], picture[12:, 24:36] = 100, 200
    seen = vision.see(picture, alone=True)
    [(crops, grid)] = seen.crops
    assert grid == (2, 2) and crops.shape == (4, 12, 12, 3)
    assert [crop.mean() for crop in crops] == [100, 0, 0, 200]
    batch = vision.batch([[1, 9, 2], [1, 9, 9, 2]], [[seen], [seen, seen]], 0)
    assert batch["pixels"].shape == (2, 2, 12, 12, 3) and batch["crops"].shape[:3] == (2, 2, 4)
    np.testing.assert_array_equal(batch["crops"][1, 1], crops)
    assert (batch["crops"][0, 1] == 0).all()
    whole = TileVision(Single(replace(pipeline, crop=None)), 9, 4, (2, 2), crops=Crops(4))
    assert whole.see(picture, alone=True).crops[0][0].shape == (2, 12, 24, 3)
