"""ConvNeXt against timm's, through the key table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, timm, torch
from zoo.models.parts.towers.convnext import ConvNeXtConfig, convnext_table

TINY = ConvNeXtConfig(image_size=64, depths=(1, 2, 6, 1), widths=(8, 12, 16, 24))


def shapes(config):
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), pixels)["params"])


def trunk(state):
    return {key: array for key, array in state.items() if not key.startswith("head.")}


def test_a_tiny_one_gives_the_same():
    """On images that are not square."""
    theirs = redraw(timm.models.ConvNeXt(depths=TINY.depths, dims=TINY.widths, num_classes=0))
    table, state = convnext_table(TINY), trunk(state_of(theirs))
    params = table.load(state, shapes(TINY))
    pixels = np.random.default_rng(0).normal(size=(2, 96, 64, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs.forward_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    features = jax.jit(TINY.build().apply)({"params": params}, pixels[:, None])
    assert features.grid == (3, 2)
    close(features.tokens[:, 0], want.flatten(2).transpose(1, 2))
    back = table.save(params)
    assert set(back) == set(state)
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key])


def test_the_large_one_has_the_same_parameters():
    config = ConvNeXtConfig()
    with torch.device("meta"):
        theirs = timm.create_model("convnext_large_mlp", num_classes=0)
    keys = convnext_table(config).shapes(shapes(config))
    assert keys == trunk({key: tuple(leaf.shape) for key, leaf in theirs.state_dict().items()})
    assert config.grid == (10, 10)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 100}, "image_size = 100: want a multiple of the stride 32"),
        ({"depths": (1, 2)}, "want one of each per stage"),
        ({"kernel_size": 4}, "kernel_size = 4: want an odd number"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXtConfig(**sizes)
