"""ESPCN, the shuffle of pixels, luma and chroma, and the metric and objective of restoration."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.models.draw import draw
from zoo.cli import count_parameters
from zoo.evaluate.dense import psnr
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import config
from zoo.models.generators.espcn import LAYOUTS, VARIANTS, layout_of, table
from zoo.models.parts.layers.spatial import (
    depth_to_space,
    merge_tiles,
    space_to_depth,
    split_tiles,
)
from zoo.processors.colour import rgb_to_ycbcr, ycbcr_to_rgb
from zoo.train.objectives.restore import Restore


@pytest.mark.parametrize(("factor", "count"), [(2, 21_284), (3, 22_729), (4, 24_752)])
def test_parameters(factor, count):
    assert count_parameters(config(f"espcn_x{factor}"))["total"] == count


@pytest.mark.parametrize("order", ["channels_first", "cells_first"])
@pytest.mark.parametrize("factors", [(2, 3), (2, 3, 2)])
def test_where_the_pixels_of_a_cell_lie(order, factors):
    cells, channels, n = math.prod(factors), 2, len(factors)
    small = (2, 3, 4)[:n]
    shape = (5, *small, channels * cells)
    x = np.arange(math.prod(shape)).reshape(shape)
    y = depth_to_space(jnp.asarray(x), factors, order)
    place, inside, channel = (1,) * n, tuple(f - 1 for f in factors), 1
    number = np.ravel_multi_index(inside, factors)
    at = channel * cells + number if order == "channels_first" else number * channels + channel
    big = tuple(p * f + i for p, f, i in zip(place, factors, inside, strict=True))
    assert y[(4, *big, channel)] == x[(4, *place, at)]
    np.testing.assert_array_equal(space_to_depth(y, factors, order), x)


def test_tiles_there_and_back():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tiles = split_tiles(x, 2, 3)
    assert tiles.shape == (2, 2, 3, 2, 2, 3)
    np.testing.assert_array_equal(tiles[:, 1, 2], x[:, 2:, 4:])
    np.testing.assert_array_equal(merge_tiles(tiles), x)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (depth_to_space, ((2, 2), "cells_first"), "6 channels, want a multiple of 4"),
        (space_to_depth, ((2, 2), "cells_first"), "want multiples of"),
        (depth_to_space, ((2, 3), "torch"), "want one of channels_first, cells_first"),
        (split_tiles, (2, 2), "want multiples of"),
    ],
)
def test_what_does_not_fit_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.zeros((1, 3, 3, 6)), *arguments)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 6, 6, 3), np.float32), r"want \[..., height, width, 1\]"),
        (np.zeros((1, 6, 6, 1), np.uint8), "uint8, want floats"),
    ],
)
def test_wrong_pictures_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(VARIANTS["espcn_tiny"].build().init, jax.random.key(0), {"pixels": pixels})


def test_all_layouts_say_the_same():
    tiny = VARIANTS["espcn_tiny"]
    shapes = nn.unbox(
        jax.eval_shape(tiny.build().init, jax.random.key(0), tiny.inputs(1))["params"]
    )
    params = draw(shapes)
    for layout in LAYOUTS:
        state = table(tiny, layout).save(params)
        assert layout_of(state) == layout
        back = table(tiny, layout).load(state, params)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(UsageError, match="want those of one of the layouts"):
        layout_of(["head.weight"])


def test_the_loss_is_the_error_before_the_shuffle():
    tiny, rng = VARIANTS["espcn_tiny"], np.random.default_rng(0)
    model = tiny.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), tiny.inputs(1))["params"]
    variables = {"params": draw(shapes)}
    batch = {
        "pixels": jnp.asarray(rng.uniform(size=(2, 6, 6, 1)), jnp.float32),
        "target": jnp.asarray(rng.uniform(size=(2, 12, 12, 1)), jnp.float32),
    }
    key = jax.random.key(0)
    terms, means, carried = Restore().loss(model, variables, {}, batch, key, None)
    cells = model.apply(variables, batch).cells
    want = jnp.mean((cells - space_to_depth(batch["target"], (2, 2), "channels_first")) ** 2)
    np.testing.assert_allclose(terms["loss"].value, want, rtol=1e-5)
    shown = model.apply(variables, batch["pixels"], method="upscale")
    decibels = psnr(np.asarray(shown), np.asarray(batch["target"])).mean()
    np.testing.assert_allclose(means["psnr"].value, decibels, rtol=1e-5)
    assert not carried
    with pytest.raises(ValueError, match=r"target: got \(2, 6, 6, 1\)"):
        Restore().loss(model, variables, {}, {**batch, "target": batch["pixels"]}, key, None)


def test_colours():
    rgb = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    jpeg = np.asarray(Image.fromarray(rgb).convert("YCbCr"), float)
    assert np.abs(rgb_to_ycbcr(rgb) - jpeg).max() <= 1  # Pillow rounds
    for span in ("full", "studio"):
        np.testing.assert_allclose(ycbcr_to_rgb(rgb_to_ycbcr(rgb, span), span), rgb, atol=1e-9)
    white = rgb_to_ycbcr(np.full((1, 3), 255), "studio")
    np.testing.assert_allclose(white, [[235, 128, 128]], atol=1e-9)
    with pytest.raises(UsageError, match="want one of full, studio"):
        rgb_to_ycbcr(rgb, "video")


def test_the_ratio_of_the_two_ranges():
    """Luma of studio range has errors that are 219 / 255 as large."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 255, (2, 8, 8, 3))
    full, studio = (
        psnr(rgb_to_ycbcr(a, span)[..., :1], rgb_to_ycbcr(b, span)[..., :1], peak=255)
        for span in ("full", "studio")
    )
    np.testing.assert_allclose(studio - full, 1.322, atol=5e-4)


def test_psnr():
    target = np.zeros((2, 6, 6, 1))
    image = target.copy()
    image[0, 0, 0] = 0.6  # at the edge
    np.testing.assert_allclose(psnr(image, target), [10 * math.log10(36 / 0.36), math.inf])
    assert np.isinf(psnr(image, target, border=1)).all()
    with pytest.raises(UsageError, match="leaves nothing"):
        psnr(image, target, border=3)
    with pytest.raises(UsageError, match="alike"):
        psnr(image, target[:1])
