"""Pictures at several scales: sizes, blocks, and how their tokens are read."""

import numpy as np
import pytest

from tests.live.reference import torch
from zoo.processors import pyramid


@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        ((1008, 1008), [(3, 3)]),
        ((2016, 1500), [(3, 3), (6, 5)]),
        ((4000, 3000), [(3, 3), (6, 5), (12, 9)]),
        ((500, 9000), [(1, 3), (1, 4), (1, 7), (1, 14), (2, 27)]),
        ((200, 100), [(1, 1)]),
        ((336, 336), [(1, 1)]),
    ],
)
def test_levels(size, blocks):
    levels = pyramid.pyramid(size)
    assert [level.blocks for level in levels] == blocks
    for level in levels:
        assert any(length == 336 * n for length, n in zip(level.size, level.blocks, strict=True))
        assert all(length <= 336 * n for length, n in zip(level.size, level.blocks, strict=True))
        assert level.size[0] / level.size[1] == pytest.approx(size[0] / size[1], rel=0.02)
    assert pyramid.thumbnail(size).blocks == (1, 1)


def test_pictures_without_pixels():
    with pytest.raises(ValueError, match="at least one pixel"):
        pyramid.pyramid((0, 5))


def test_blocks_are_resized_as_torch_does():
    picture = np.random.default_rng(0).normal(size=(50, 37, 3)).astype(np.float32)
    level = pyramid.pyramid(picture.shape[:2], block=8, base=24)[0]
    blocks = pyramid.blocks_of(picture, level, 8)
    assert blocks.shape == (*level.blocks, 8, 8, 3)
    whole = blocks.swapaxes(1, 2).reshape(level.blocks[0] * 8, -1, 3)
    given = torch.tensor(picture.transpose(2, 0, 1))[None]
    want = torch.nn.functional.interpolate(given, size=level.size, mode="bilinear")
    want = want[0].numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(whole[: level.size[0], : level.size[1]], want, atol=1e-5)
    assert not whole[level.size[0] :].any() and not whole[:, level.size[1] :].any()


def test_tokens_are_read_row_by_row():
    found = pyramid.read_rows((1, 2), (10, 15), 2)
    assert found.tolist() == [0, 1, 4, -1, 2, 3, 6, -1]
    assert pyramid.covered((1, 100), (6, 6)) == (1, 6)


def test_a_batch():
    rng = np.random.default_rng(0)
    pictures = [rng.normal(size=size).astype(np.float32) for size in ((20, 12, 3), (70, 50, 3))]
    batch = pyramid.pyramid_batch(pictures, block=8, base=16, side=2)
    coarse, fine = (pyramid.pyramid(p.shape[:2], block=8, base=16) for p in pictures), 2
    blocks = [[level.blocks for level in levels[:fine]] for levels in coarse]
    assert batch["view_grid"][:, 0].tolist() == [list(each[-1]) for each in blocks]
    assert batch["pixels"].shape[1] >= 1 + max(np.prod(each[0]) for each in blocks)
    np.testing.assert_array_equal(
        batch["pixels"][1, 1],
        pyramid.blocks_of(pictures[1], pyramid.pyramid((70, 50), block=8, base=16)[0], 8)[0, 0],
    )
    for name, tiles in (("", batch["pixels"].shape[1] - 1), ("fine_", batch["crops"].shape[2])):
        newline = 16 + tiles * 4
        for row, size in zip(batch[f"{name}layout"], batch[f"{name}sizes"][:, 0], strict=True):
            assert row[:17].tolist() == [*range(16), newline + 1]
            assert row[size - 1] == newline and not row[size:].any()
            parts = row[17:size]
            kept = parts[parts != newline]
            assert len(set(kept)) == len(kept) and (kept < newline).all() and (kept >= 16).all()
