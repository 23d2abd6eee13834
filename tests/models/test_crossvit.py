"""CrossViT: FLOPs, crossing, images of other sizes, dropped paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import cost, measure
from zoo.models.core import registry
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.vision.crossvit import Crossing, CrossViTConfig

TINY = registry.config("crossvit_tiny")

# Multiplications and additions of one image in 10^9, of timm's models.
GMACS = {
    "crossvit_tiny_240": 1.56,
    "crossvit_small_240": 5.62,
    "crossvit_base_240": 21.2,
    "crossvit_9_240": 1.84,
    "crossvit_15_240": 5.79,
    "crossvit_18_240": 9.03,
    "crossvit_9_dagger_240": 1.98,
    "crossvit_15_dagger_240": 6.11,
    "crossvit_18_dagger_240": 9.47,
    "crossvit_15_dagger_408": 21.4,
    "crossvit_18_dagger_408": 32.4,
}


def pixels(*sides, batch=2):
    return np.random.default_rng(1).normal(size=(batch, *sides, 3)).astype(np.float32)


@pytest.mark.parametrize("name", GMACS)
def test_flops(name):
    """Half the FLOPs of all products and convolutions, without those that resize the picture."""
    config = registry.config(name)
    image = config.inputs(1)["pixels"]
    side = config.tower.image_sizes[1]
    resizing, _ = measure(lambda _, x: resize_bicubic(x, side, side), {}, image)
    found = (cost(name).flops["encode"].total - resizing.total) / 2e9
    np.testing.assert_allclose(found, GMACS[name], rtol=0.01)


def test_the_order_of_patches_does_not_matter_to_a_crossing():
    """Nor is there anything quadratic in it: one query reads all."""
    module, rng = Crossing(8, 16, 2, 1e-6), np.random.default_rng(0)
    cls, patches = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 1, 8), (2, 7, 16)))
    shapes = jax.eval_shape(
        lambda key: module.init(key, cls, patches, None, train=False), jax.random.key(0)
    )
    params = draw(shapes)
    one = module.apply(params, cls, patches, method="read")
    other = module.apply(params, cls, patches[:, ::-1], method="read")
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one - module.apply(params, cls, patches[:, :6], method="read")).max() > 1e-3

    def flops(number):
        x = jax.ShapeDtypeStruct((1, number, 16), jnp.float32)
        return measure(lambda p, x: module.apply(p, cls[:1], x, method="read"), params, x)[0].total

    assert flops(400) - flops(300) == flops(300) - flops(200)


def test_images_of_any_size_and_dropped_paths():
    """Each branch sees the picture in its own size; the taps are those of the first branch."""
    tower = dataclasses.replace(TINY.tower, drop_path=0.5)
    config = dataclasses.replace(TINY, tower=tower)
    model, image = config.build(), pixels(24, 24, batch=8)
    params = draw(jax.eval_shape(model.init, jax.random.key(0), {"pixels": image})["params"])

    @jax.jit
    def run(image):
        return model.apply({"params": params}, {"pixels": image}, taps=(0, 2))

    @jax.jit
    def trained(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, {"pixels": image}, train=True, rngs=rngs).logits

    out = run(image)
    assert out.features.grid == (2, 2)
    assert [each.shape for each in out.features.pyramid] == [(8, 2, 2, 8), (8, 2, 2, 16)]
    assert out.features.cls.shape == (8, 24) and set(out.features.taps) == {0, 2}
    assert out.features.taps[2].shape == (8, 5, 8)
    first, second = trained(jax.random.key(0)), trained(jax.random.key(1))
    assert np.abs(first - out.logits).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    large = pixels(37, 50)
    both = {side: resize_bicubic(large, side, side) for side in tower.image_sizes}
    assert run(large).logits.shape == (2, 5)
    embedded = model.apply(
        {"params": params}, large, 1, method=lambda m, x, b: m.tower._embed(x, b)
    )
    want = model.apply({"params": params}, both[32], 1, method=lambda m, x, b: m.tower._embed(x, b))
    np.testing.assert_array_equal(embedded, want)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="230 is no multiple of its patch size 16"):
        CrossViTConfig(image_sizes=(240, 230))
    with pytest.raises(ValueError, match="pool = 'mean': want 'cls'"):
        dataclasses.replace(TINY, pool="mean")
    with pytest.raises(ValueError, match="a stem wants each of 12 or 16"):
        CrossViTConfig(image_sizes=(32, 32), patch_sizes=(4, 8), stem=True)
    with pytest.raises(ValueError, match=r"taps \[3\]: want 0 to 2"):
        TINY.build().init(jax.random.key(0), {"pixels": pixels(24, 24)}, taps=(3,))
