"""Tokens-to-Token ViT: cutting, the Performer, other sizes, training."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import measure
from zoo.models.core import registry
from zoo.models.core.tree import flatten_dict
from zoo.models.parts.layers.spatial import unfold
from zoo.models.vision.t2t_vit import (
    T2TConfig,
    TokenAttention,
    linear_attention,
    positive_features,
)

TINY = T2TConfig(image_size=32, width=16, depth=2, num_heads=2, mlp_dim=32, token_dim=8)


def pixels(height, width):
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)


def test_unfold_by_hand():
    """Every square, pixel by pixel; a picture that the squares do not fill evenly."""
    x = np.random.default_rng(0).normal(size=(2, 9, 6, 3)).astype(np.float32)
    size, stride, padding = 4, 3, 1
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    got = np.asarray(unfold(x, size, stride, padding))
    assert got.shape == (2, 3, 2, 3 * size**2)
    for row in range(3):
        for column in range(2):
            square = padded[:, row * stride :, column * stride :][:, :size, :size]
            want = square.transpose(0, 3, 1, 2).reshape(2, -1)
            np.testing.assert_array_equal(got[:, row, column], want)
    with pytest.raises(ValueError, match="want 4 or more"):
        unfold(x[:, :1], size, stride, padding)


def test_the_performer_is_linear_in_its_tokens():
    def flops(number):
        x = jax.ShapeDtypeStruct((1, number, 147), jnp.float32)
        layer = TokenAttention(147, 64, "performer")
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        return measure(layer.apply, nn.unbox(params), x)[0].total

    assert flops(6400) == 2 * flops(3200)


def test_many_directions_approach_the_softmax():
    rng = np.random.default_rng(0)
    q, k, v = (0.5 * rng.normal(size=(1, 6, 8)) for _ in range(3))
    many = rng.normal(size=(50_000, 8)).astype(np.float32)
    got = linear_attention(positive_features(q, many), positive_features(k, many), v)
    want = jax.nn.softmax(q @ k.swapaxes(1, 2), -1) @ v
    np.testing.assert_allclose(got, want, atol=0.02)
    assert np.abs(want - v.mean(1, keepdims=True)).max() > 0.1


def test_positions_and_what_is_fixed():
    """Sines and cosines in turn, the class token first; the counts of learned parameters."""
    shapes = jax.eval_shape(TINY.build().init, jax.random.key(0), pixels(32, 32))
    table = TINY.build()._first_positions(jax.random.key(0))
    for place, entry in ((0, 3), (2, 5), (4, 10)):
        angle = place / 10_000 ** (2 * (entry // 2) / 16)
        want = math.sin(angle) if entry % 2 == 0 else math.cos(angle)
        assert table[place, entry] == pytest.approx(want, abs=1e-6)
    assert table.shape == nn.unbox(shapes)["params"]["position"].shape
    for name, learned in (("t2t_vit_7", 4_255_694), ("t2t_vit_14", 21_465_806)):
        config = registry.config(name)
        made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
        leaves = flatten_dict(nn.unbox(made["params"]))
        unread = {tuple(path.split("/")) for path in config.unread}
        assert sum(leaf.size for path, leaf in leaves.items() if path not in unread) == learned


@pytest.mark.parametrize("kind", ["performer", "transformer"])
def test_training_and_another_size(kind):
    """The Performer's own dropout is there in training; images of 48 x 32 have a grid of 3 x 2."""
    config = T2TConfig(
        image_size=32,
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=32,
        token_dim=8,
        token_module=kind,
    )
    model, images = config.build(), pixels(48, 32)
    params = draw(jax.eval_shape(model.init, jax.random.key(0), images)["params"])

    @jax.jit
    def both(params):
        rngs = {"dropout": jax.random.key(0)}
        plain = model.apply({"params": params}, images)
        return plain, model.apply({"params": params}, images, train=True, rngs=rngs).tokens

    plain, trained = both(params)
    assert plain.grid == (3, 2) and plain.tokens.shape == (2, 6, 16)
    assert np.allclose(plain.tokens, trained, atol=1e-6) == (kind == "transformer")


def test_wrong_sizes():
    with pytest.raises(ValueError, match="multiples of 16"):
        TINY.build().init(jax.random.key(0), pixels(40, 32))
    with pytest.raises(ValueError, match="want performer or transformer"):
        T2TConfig(token_module="mamba")
    with pytest.raises(ValueError, match="patch_size = 8: want 16"):
        T2TConfig(patch_size=8)
