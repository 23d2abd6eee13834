"""STU-Net: published sizes and FLOPs, what norms take away, transfer to other tasks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.models.draw import draw
from zoo.costing import cost
from zoo.models.core.errors import UsageError
from zoo.models.core.tree import flat_paths, nested
from zoo.models.dense.stunet import (
    VARIANTS,
    STUNetConfig,
    for_task,
    padded,
    supervision_weights,
    table,
)

# {size: (parameters, multiplications and additions of 128^3 voxels, in 10^9)}
PUBLISHED = {
    "stunet_s": (14_596_941, 129.4),
    "stunet_b": (58_262_669, 506.2),
    "stunet_l": (440_302_605, 3803.5),
    "stunet_h": (1_457_326_221, 12593.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops(name):
    """Published is what the channels' mixing costs after the voxels are repeated; here it comes
    before, on an eighth of them.
    """
    params, gmacs = PUBLISHED[name]
    found, widths = cost(name), VARIANTS[name].widths
    assert found.params["total"] == params
    pairs = itertools.pairwise(widths)
    saved = sum(a * b * (128 >> level) ** 3 * 7 / 8 for level, (a, b) in enumerate(pairs))
    np.testing.assert_allclose(found.flops["encode"].total / 2e9 + saved / 1e9, gmacs, rtol=0.001)


TINY = VARIANTS["stunet_tiny"]


def shapes(config):
    made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    return nn.unbox(made["params"])


@pytest.fixture(scope="module")
def params():
    return draw(shapes(TINY))


@pytest.fixture(scope="module")
def segment():
    pixels = np.random.default_rng(0).normal(size=(1, 4, 8, 8, 1)).astype(np.float32)
    run = jax.jit(lambda params: TINY.build().apply({"params": params}, {"pixels": pixels}))
    return lambda params: np.asarray(run(params).logits)


@pytest.mark.parametrize(("name", "same"), [("conv1", True), ("conv2", True), ("shortcut", False)])
def test_norms_take_scales_away(params, segment, name, same):
    """Convolutions that a norm follows may be scaled, the shortcut may not."""
    scaled = {
        path: leaf * 3 if path.startswith("down_1/") and f"/{name}/kernel" in path else leaf
        for path, leaf in flat_paths(params).items()
    }
    near = np.abs(segment(nested(scaled)) - segment(params)).max() / np.abs(segment(params)).max()
    assert near < 1e-3 if same else near > 1e-2


def test_another_task(params):
    """Three channels and two classes: heads are new, the first kernels repeated, all else kept."""
    config = STUNetConfig(
        TINY.widths, TINY.depth, TINY.strides, channels=3, num_classes=2, sides=TINY.sides
    )
    fresh = draw(shapes(config), 1)
    made = for_task(config, params, fresh)
    kernel = params["down_0"]["blocks_0"]["conv1"]["kernel"]
    got = made["down_0"]["blocks_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(got, np.repeat(kernel, 3, -2))
    np.testing.assert_array_equal(made["heads_1"]["kernel"], fresh["heads_1"]["kernel"])
    kept, old = (tree["up_0"]["blocks_1"]["conv2"]["bias"] for tree in (made, params))
    np.testing.assert_array_equal(kept, old)
    wider = STUNetConfig((5, 6, 8), TINY.depth, TINY.strides, sides=TINY.sides)
    with pytest.raises(UsageError, match="want equal widths"):
        for_task(wider, params, draw(shapes(wider)))


def test_plans():
    assert padded(((1, 2, 2), (2, 2, 2)), 4) == ((1, 2, 2), (2, 2, 2), (1, 1, 1))
    assert len(padded(((2, 2, 2),) * 7)) == 5
    weights = supervision_weights(5)
    assert weights[-1] == 0 and sum(weights) == pytest.approx(1)
    assert weights[1] == weights[0] / 2 and supervision_weights(1) == (1.0,)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 4, 8, 6, 1), np.float32, "multiples of"),
        ((1, 2, 4, 4, 1), np.float32, "one voxel is left"),
        ((4, 8, 8, 1), np.float32, "want .B, depth, height, width"),
        ((1, 4, 8, 8, 2), np.float32, "channels last"),
        ((1, 4, 8, 8, 1), np.uint8, "want floats"),
    ],
)
def test_bad_volumes(shape, dtype, message):
    batch = {"pixels": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.build().init, jax.random.key(0), batch)


def test_bad_sizes():
    with pytest.raises(ValueError, match="a stride for each"):
        STUNetConfig((4, 8, 8))
    with pytest.raises(ValueError, match="want one number for each"):
        STUNetConfig(depth=(1, 2))


def test_uneven_depths():
    """A stage on the way up has the blocks of its level."""
    config = STUNetConfig((2, 3, 4), (1, 3, 2), TINY.strides, sides=TINY.sides)
    made = shapes(config)
    counts = {name: len(made[name]) for name in ("down_0", "down_1", "down_2", "up_0", "up_1")}
    assert counts == {"down_0": 1, "down_1": 3, "down_2": 2, "up_0": 3, "up_1": 1}
    assert "conv_blocks_localization.0.2.conv2.bias" in table(config).shapes(made)
