"""InceptionNeXt: what its mixer touches, how far it sees, what it costs; wrong settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import measure
from zoo.models.vision.inceptionnext import InceptionConv, InceptionNeXtConfig

BRANCH, BAND, WIDTH, SIDE = 2, 11, 16, 13
MIXER = InceptionConv(BRANCH, BAND)
GRID = jax.ShapeDtypeStruct((1, SIDE, SIDE, WIDTH), jnp.float32)
SHAPES = jax.eval_shape(MIXER.init, jax.random.key(0), GRID)


def test_what_the_mixer_touches():
    """The first five eighths stay; one cell moves a square of 3 x 3, a row and a column of 11."""
    params = draw(dict(SHAPES))
    x = np.random.default_rng(0).normal(size=GRID.shape).astype(np.float32)
    touched = x.copy()
    touched[0, 6, 6] += 1
    run = jax.jit(lambda x: MIXER.apply(params, x))
    before, after = np.asarray(run(x)), np.asarray(run(touched))
    np.testing.assert_array_equal(before[..., : WIDTH - 3 * BRANCH], x[..., : WIDTH - 3 * BRANCH])
    moved = (before != after)[0].any(-1, where=np.arange(WIDTH) >= WIDTH - 3 * BRANCH)
    want = np.zeros((SIDE, SIDE), bool)
    want[5:8, 5:8] = want[6, 1:12] = want[1:12, 6] = True
    np.testing.assert_array_equal(moved, want)


def test_what_the_mixer_costs():
    """C / 8 (9 + 11 + 11 and three biases) parameters; a place costs g (9 + 22) products, those of
    7 x 7 filters 49 C.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(SHAPES))
    assert count == WIDTH // 8 * (9 + 11 + 11 + 3)
    flops, _ = measure(MIXER.apply, dict(SHAPES), GRID)
    assert flops.total / 2 == SIDE**2 * BRANCH * (9 + 22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, "one of each per stage"),
        ({"band": 10}, "an odd number"),
        ({"branch": 0.4}, "a third at most"),
        ({"image_size": 100}, "a multiple of the stride 32"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        InceptionNeXtConfig(**changes)
