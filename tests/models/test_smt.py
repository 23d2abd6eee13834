"""The scale-aware modulation transformer: modulation, images of any size, training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.vision.smt import Modulation, SMTConfig

TINY = registry.config("smt_tiny")


def pixels(*sides, batch=2):
    return np.random.default_rng(1).normal(size=(batch, *sides, 3)).astype(np.float32)


def test_a_modulator_of_ones_leaves_the_values():
    module = Modulation(12, 4, 2)
    x = jnp.tile(pixels(5, 6), (1, 1, 1, 4))
    variables = draw(jax.eval_shape(module.init, jax.random.key(0), x))
    down = variables["params"]["down"]
    down["kernel"], down["bias"] = 0 * down["kernel"], np.ones_like(down["bias"])
    out, v = variables["params"]["out"], variables["params"]["v"]
    want = (x @ v["kernel"] + v["bias"]) @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(module.apply(variables, x), want, atol=1e-5)


def test_filters_see_as_far_as_their_sides():
    """One pixel moves the first group within 1, and the fourth within 4."""
    module = Modulation(4, 4, 2)
    x = np.zeros((1, 11, 11, 4), np.float32)
    variables = draw(jax.eval_shape(module.init, jax.random.key(0), x))
    touched = x.copy()
    touched[0, 5, 5] = 1
    change = [
        np.abs(np.asarray(b) - np.asarray(a)).max((0, 1, 3)) > 1e-6
        for a, b in (
            (
                module.bind(variables).local[i](x[..., i : i + 1]),
                module.bind(variables).local[i](touched[..., i : i + 1]),
            )
            for i in range(4)
        )
    ]
    assert [int(each.sum()) for each in change] == [3, 5, 7, 9]


@pytest.mark.parametrize("depth", [2, 3])
def test_training_and_images_of_any_size(depth):
    """Statistics move, paths are dropped; sides that are no multiples of anything."""
    tower = dataclasses.replace(TINY.tower, depths=(1, 1, depth, 1), drop_path=0.5)
    config = dataclasses.replace(TINY, tower=tower)
    model, images = config.build(), pixels(50, 37, batch=4)
    variables = draw(dict(jax.eval_shape(model.init, jax.random.key(0), {"pixels": images})))

    @jax.jit
    def both(variables):
        plain = model.apply(variables, {"pixels": images}, taps=(3,))
        rngs = {"dropout": jax.random.key(0)}
        options = {"train": True, "rngs": rngs, "mutable": ["stats"]}
        return plain, *model.apply(variables, {"pixels": images}, **options)

    plain, trained, changed = both(variables)
    shapes = [each.shape[1:3] for each in plain.features.pyramid]
    assert shapes == [(12, 9), (6, 5), (3, 3), (2, 2)]
    assert plain.features.grid == (2, 2) and plain.features.taps[3].shape == (4, 9, 16)
    assert np.abs(plain.logits - trained.logits).max() > 1e-3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), changed["stats"], variables["stats"])
    assert all(value > 0 for value in jax.tree.leaves(moved))


def test_wrong_sizes():
    with pytest.raises(ValueError, match="want a height and a width of 4 or more"):
        TINY.build().init(jax.random.key(0), {"pixels": pixels(3, 40)})
    with pytest.raises(ValueError, match=r"widths \[66\]: want multiples of filters = 4"):
        SMTConfig(widths=(66, 128, 256, 512))
    with pytest.raises(ValueError, match=r"widths \[256\]: want multiples of num_heads"):
        SMTConfig(num_heads=(7, 16))
