"""Masked autoencoders: what the loss reads, the published sizes, planes of accuracies, a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.configs.mae_digits import config as experiment
from zoo.models.core.errors import UsageError
from zoo.train.objectives.masked import MaskedPixels, patch_errors, patch_targets
from zoo.train.recipes.mae_human_scaling import VARIANTS, fit_accuracy

TUNED = {
    "s14.tuned": 22_004_584,
    "b14.tuned": 86_475_496,
    "l14.tuned": 304_203_752,
    "h14.tuned": 632_045_800,
    "h14.448_tuned": 633_028_840,
    "h14.476_tuned": 633_197_800,
}


@pytest.mark.parametrize("size", TUNED)
def test_parameters(size):
    config = VARIANTS[f"mae_human_scaling_{size}"]
    made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == TUNED[size]


class Recorded:
    """Stands for a model: the patches that it is given are its answer."""

    config = VARIANTS["mae_human_scaling_tiny"]

    def __init__(self, patches):
        self.patches = patches

    def __call__(self, batch, *, draws=None):
        raise NotImplementedError

    def apply(self, variables, batch, *, method, rngs=None, draws=None):
        place = jnp.argsort(jnp.argsort(draws, -1), -1)
        hidden = place >= self.config.num_kept
        return type("Out", (), {"patches": self.patches(hidden), "hidden": hidden})()


def test_only_hidden_patches_count():
    """What is said about the patches that were seen changes nothing; of 16, 3 are seen."""
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    target = patch_targets(pixels, 4)

    def loss(patches):
        found = MaskedPixels().loss(
            Recorded(patches), {}, {}, {"pixels": pixels}, jax.random.key(1), None
        )
        return found[0]["loss"]

    seen = loss(lambda hidden: target + 7.0 * ~hidden[..., None])
    assert seen.value == 0 and seen.weight == 2 * 13
    wrong = loss(lambda hidden: target + 2.0 * hidden[..., None])
    np.testing.assert_allclose(wrong.value, 4.0, rtol=1e-5)


def test_targets():
    pixels = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    plain = patch_targets(pixels, 2)
    np.testing.assert_array_equal(plain[1, 4], pixels[1, 2:4, 2:4].reshape(-1))
    normed = np.asarray(patch_targets(pixels, 2, normalise=True))
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normed.std(-1, ddof=1), 1, rtol=1e-5)
    np.testing.assert_allclose(patch_errors(plain + 3, plain), 9, rtol=1e-5)


def test_plane_of_accuracies():
    rng = np.random.default_rng(0)
    factors = 10 ** rng.uniform(0, 4, (12, 2))
    accuracy = 5 + np.log10(factors) @ [3.0, -1.5]
    plane = fit_accuracy(factors, accuracy)
    np.testing.assert_allclose([plane.intercept, *plane.slopes, plane.r2], [5, 3, -1.5, 1])
    assert plane(1000.0, 10.0) == pytest.approx(5 + 9 - 1.5)
    with pytest.raises(UsageError, match="tell 2 factors apart"):
        fit_accuracy([(1.0, 2.0)] * 4, [1.0] * 4)
    with pytest.raises(UsageError, match="above 0"):
        fit_accuracy([(1.0, 0.0)] * 4, [1.0] * 4)
    with pytest.raises(UsageError, match="want 2 numbers"):
        plane(3.0)


def test_the_recipe():
    found = experiment()
    assert found.objective == MaskedPixels() and found.optim.b2 == 0.95
    assert found.model.num_kept == 16
