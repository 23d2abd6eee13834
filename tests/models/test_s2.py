"""S²: around any tower, in LLaVA's place of a tower, and what it costs."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import measure
from zoo.models.core.registry import config
from zoo.models.core.tree import flatten_dict
from zoo.models.core.types import Features
from zoo.models.parts.towers.convnext import ConvNeXtConfig
from zoo.models.parts.towers.vit import ViTConfig
from zoo.models.vision.s2 import S2Config, multiscale

TOWER = ViTConfig(image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32)


def variables(tower, side):
    pixels = jnp.zeros((1, side, side, 3))
    return {"params": draw(jax.eval_shape(tower.build().init, jax.random.key(0), pixels)["params"])}


def encoded(tower, own, pixels):
    return jax.jit(lambda v, x: tower.build().apply(v, x, taps=(1,)))(own, pixels)


def picture(side, lead=()):
    drawn = np.random.default_rng(0).normal(size=(*lead, side, side, 3))
    return jnp.asarray(drawn, jnp.float32)


def test_one_size_is_the_tower_itself():
    own, pixels = variables(TOWER, 8), picture(8, (2, 3))
    single = S2Config(TOWER, sizes=(8,), tile=8)
    want = encoded(TOWER, own, pixels)
    got = encoded(single, own, pixels)
    assert got.grid == want.grid
    for a, b in ((got.tokens, want.tokens), (got.cls, want.cls), (got.taps[1], want.taps[1])):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_first_block_of_channels_is_the_tower_on_the_small_picture():
    own, pixels = variables(TOWER, 8), picture(8, (2,))
    three = S2Config(TOWER, sizes=(8, 16, 24), tile=8)
    found = encoded(three, own, pixels)
    want = encoded(TOWER, own, pixels)
    assert found.tokens.shape == (2, 4, three.width)
    assert found.taps[1].shape == (2, 5, three.width)
    np.testing.assert_allclose(found.tokens[..., :16], want.tokens, atol=1e-6)
    np.testing.assert_allclose(found.taps[1][..., :16], want.taps[1], atol=1e-6)
    np.testing.assert_allclose(found.cls[..., :16], want.cls, atol=1e-6)


def test_parameters_are_those_of_the_tower():
    three = S2Config(TOWER, sizes=(8, 16), tile=8)
    names = [
        sorted(flatten_dict(variables(tower, side)["params"]))
        for tower, side in ((TOWER, 8), (three, 16))
    ]
    assert names[0] == names[1]


def test_a_tower_that_averages_says_the_same_at_every_size():
    def encode(pixels):
        cells = pixels.reshape(*pixels.shape[:-3], 4, pixels.shape[-2] // 4, 4, -1, 3)
        return Features(cells.mean((-4, -2)).reshape(*pixels.shape[:-3], 16, 3), (4, 4))

    ramp = jnp.linspace(-1, 1, 32)
    rows, columns = jnp.meshgrid(ramp, ramp, indexing="ij")
    pixels = jnp.stack([rows, rows * columns, columns], -1)
    found = multiscale(encode, pixels, (32, 64, 96), 32).tokens
    for block in (1, 2):
        np.testing.assert_allclose(found[..., :3], found[..., 3 * block :][..., :3], atol=0.02)


def test_flops_are_those_of_all_tiles():
    """336, 672 and 1008 pixels: 1 + 4 + 9 times the tower."""
    flops = {}
    for name, tower, side in (
        ("tower", ViTConfig(), 336),
        ("s2", S2Config(), 1008),
    ):
        module, pixels = tower.build(), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
        run = lambda p, x, m=module: m.apply({"params": p}, x).tokens
        flops[name] = measure(run, nn.unbox(shapes), pixels)[0].weights
    assert 14 * flops["tower"] <= flops["s2"] < 14.1 * flops["tower"]  # resizing is on top


def test_it_stands_in_llava():
    whole = config("s2_llava_1_5_7b")
    assert whole.tower.grid == (24, 24)
    assert whole.tile_tokens == 576
    shapes = jax.eval_shape(whole.build().init, jax.random.key(0), whole.inputs(1))["params"]
    assert nn.unbox(shapes)["connector"]["up"]["kernel"].shape == (3072, 4096)
    assert whole.inputs(1)["pixels"].shape == (1, 1, 1008, 1008, 3)


def test_any_tower_will_do():
    """One without layers to tap, which takes pictures of any size."""
    tower = ConvNeXtConfig(image_size=32, depths=(1, 1), widths=(8, 8))
    scaled = S2Config(tower, sizes=(32, 48), tile=32)
    found = jax.eval_shape(
        lambda v, x: scaled.build().apply(v, x), variables(tower, 32), picture(64, (1,))
    )
    assert found.tokens.shape == (1, 16, 16)
    assert scaled.grid == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (8, 15)}, "size = 15 does not divide into 2 tiles of at most 8"),
        ({"sizes": ()}, "want one or more"),
        ({"output": 2}, "want one or more, of which 2 is one"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(S2Config(TOWER, sizes=(8, 16), tile=8), **change)


def test_pictures_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="want square pictures"):
        jax.eval_shape(
            S2Config(TOWER, sizes=(8, 16), tile=8).build().init,
            jax.random.key(0),
            jnp.zeros((1, 8, 16, 3)),
        )
