"""The vision transformer by itself: hooks, precision, sharding, what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.base import dinov2, timm_vit, vit
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.names import spec_for, tree_names
from zoo.models.core.tree import flatten_dict

BASES = ("vit", "timm_vit", "dinov2", "vit_mae")


def pixels(*shape):
    """Random images."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def same(got, want):
    """Equal but for rounding."""
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def shapes(config):
    """Boxed shapes of the parameters."""
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]


@pytest.mark.parametrize("name", BASES)
def test_sharding(name):
    """All logical names are known; nearly all parameters of the first size are cut by fsdp."""
    boxed = shapes(registry.config(name))
    mesh, names = jax.sharding.AbstractMesh((8,), ("fsdp",)), flatten_dict(tree_names(boxed))
    leaves = flatten_dict(nn.unbox(boxed))
    cut = sum(
        x.size * (len(spec_for(names[path], x.shape, mesh)) > 0) for path, x in leaves.items()
    )
    assert cut >= 0.95 * sum(x.size for x in leaves.values())


@pytest.mark.parametrize("name", BASES)
def test_every_parameter_is_read(name):
    """But for those that the configuration lists as unread."""
    config = registry.config(f"{name}_tiny")
    model, images = config.build(), pixels(2, 16, 16, 3)
    draws = {"draws": pixels(2, 16)} if name == "vit_mae" else {}

    def loss(params):
        out = model.apply({"params": params}, {"pixels": images}, **draws)
        return sum((x.astype(jnp.float32) ** 3).sum() for x in jax.tree.leaves(out))

    grads = flatten_dict(jax.jit(jax.grad(loss))(draw(shapes(config))))
    dead = {"/".join(path) for path, leaf in grads.items() if not np.abs(leaf).max() > 0}
    assert dead == set(config.unread)


def test_hooks():
    """Kept patches, inserted tokens, an early end, images with free leading axes."""
    config = registry.config("dinov2_tiny").tower
    tower, images = config.build(), pixels(2, 16, 16, 3)
    keep = jnp.array([[3, 1, 7], [0, 2, 15]])
    slots = np.ones((2, 5, 16), np.float32)
    shape = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]

    @jax.jit
    def every(params):
        see = lambda images, **options: tower.apply({"params": params}, images, **options)
        return (
            see(images, taps=(0, 1), stop_after=1),
            see(images, taps=(0,), keep=keep, stop_after=1),
            see(images, taps=(0,), insert=slots, stop_after=0),
            see(images[:, None], keep=keep[:, None], qk=(1,), stop_after=1),
        )

    whole, some, more, free = every(draw(shape))
    same(whole.tokens, whole.taps[1][:, 3:])
    assert some.tokens.shape == (2, 3, 16) and some.grid == (4, 4)
    for row in (0, 1):
        same(some.taps[0][row, 3:], whole.taps[0][row, 3 + keep[row]])
    first = whole.taps[0]
    same(more.taps[0], np.concatenate([first[:, :3], slots, first[:, 3:]], 1))
    assert more.tokens.shape == whole.tokens.shape
    same(free.tokens[:, 0], some.tokens)
    assert free.qk[1][0].shape == (2, 1, 6, 2, 8)
    for wrong, message in (
        ({"stop_after": 1, "taps": (2,)}, r"taps \[2\]: want 0 to 1"),
        ({"qk": (0,)}, r"qk \[0\]: want 1 to 2"),
        ({"stop_after": 3}, "stop_after = 3"),
    ):
        with pytest.raises(ValueError, match=message):
            tower.apply({"params": shape}, images, **wrong)


def test_half_precision():
    """Activations in the dtype of the configuration."""
    config = dataclasses.replace(registry.config("siglip_tiny").vision, dtype="bfloat16")
    tower, images = config.build(), pixels(2, 16, 16, 3)
    variables = jax.eval_shape(tower.init, jax.random.key(0), images)
    got = jax.eval_shape(lambda v: tower.apply(v, images, taps=(0,)), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}


def test_the_pooler_is_there_if_its_weights_are():
    """Checkpoints of the class `ViTModel` may lack it, and their `config.json` does not say so."""
    config = registry.config("vit_b16.in21k")
    fit = registry.base("vit").fit
    assert fit(config, {"pooler.dense.weight"}) == config
    assert fit(config, ()) == dataclasses.replace(config, pooler=False)


def test_what_is_refused():
    """Fields that would change the numbers, images that are no squares, other architectures."""
    with pytest.raises(UsageError, match="image_size is"):
        vit.read(Fields("vit", {"image_size": [224, 196]}))
    with pytest.raises(UsageError, match="hidden_act is 'relu'"):
        dinov2.read(Fields("dinov2", {"hidden_act": "relu"}))
    with pytest.raises(UsageError, match="architecture is 'resnet50'"):
        timm_vit.read(Fields("timm", {"architecture": "resnet50"}))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        registry.config("vit_b16", image_size=230)
    with pytest.raises(ValueError, match="no class token"):
        registry.config("vit_b16", class_token=False)
