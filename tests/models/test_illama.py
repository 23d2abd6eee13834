"""iLLaMA: the soft mask and its schedule, other sizes, a teacher's weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.types import Stream, Tokens
from zoo.models.parts.layers.attention import attend, everything
from zoo.models.vision.illama import (
    SOFT_MASK,
    SoftCausalBlock,
    hidden_width,
    selected,
    table,
    weight_selection,
)

TINY = registry.config("illama_tiny")


def pixels(height, width, batch=2):
    return np.random.default_rng(1).normal(size=(batch, height, width, 3)).astype(np.float32)


def mixed(rate, v):
    """What a block reads of the values [1, 5, 2, 4]."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 5, 2, 4)), jnp.float32) for _ in range(2))
    tokens = Tokens.sequence(jnp.ones((1, 5), bool))
    block = SoftCausalBlock(width=8, num_heads=2, mlp_dim=8, parent=None)
    bound = block.bind({"params": {}})
    stream = Stream(jnp.zeros((1, 5, 8)), tokens)
    memory = {} if rate is None else {SOFT_MASK: jnp.float32(rate)}
    free = attend(q, k, v, everything, tokens, tokens)
    return np.asarray(bound.mix(stream, q, k, v, tokens, memory)), np.asarray(free)


def test_the_soft_mask():
    """With a rate of 1 all see all; with 0 weights sum to less than 1 but for the last token, and
    nothing is read of those after.
    """
    v = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 2, 4)), jnp.float32)
    got, free = mixed(1.0, v)
    np.testing.assert_allclose(got, free, atol=1e-6)
    hard, half = mixed(0.0, v)[0], mixed(0.5, v)[0]
    np.testing.assert_allclose(half, (hard + free) / 2, atol=1e-6)
    np.testing.assert_array_equal(hard, mixed(None, v)[0])
    sums = mixed(0.0, jnp.ones_like(v))[0][0, :, :, 0]
    assert (sums[:-1] < 1).all()
    np.testing.assert_allclose(sums[-1], 1, atol=1e-6)
    later = v.at[:, 3:].set(0)
    np.testing.assert_array_equal(mixed(0.0, later)[0][:, :3], hard[:, :3])


def test_a_rate_is_data_and_images_of_another_size():
    """One program for all rates; dropped paths; a grid of 2 x 6."""
    tower = dataclasses.replace(TINY.tower, drop_path=0.5)
    config = dataclasses.replace(TINY, tower=tower)
    model, images = config.build(), pixels(8, 24, 8)
    params = draw(jax.eval_shape(model.init, jax.random.key(0), {"pixels": images})["params"])

    @jax.jit
    def run(rate):
        return model.apply({"params": params}, {"pixels": images, SOFT_MASK: rate}, taps=(2,))

    @jax.jit
    def trained(key):
        batch, rngs = {"pixels": images}, {"dropout": key}
        return model.apply({"params": params}, batch, train=True, rngs=rngs).logits

    causal, free = run(0.0), run(1.0)
    assert causal.features.grid == (2, 6) and causal.features.taps[2].shape == (8, 13, 16)
    assert np.abs(causal.logits - free.logits).max() > 1e-3
    first, second = trained(jax.random.key(0)), trained(jax.random.key(1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(
        causal.logits, jax.jit(lambda: model.apply({"params": params}, {"pixels": images}))().logits
    )


def test_a_teachers_weights():
    """Every layer starts from the teacher's; the rest stays."""
    shapes = jax.eval_shape(TINY.build().init, jax.random.key(0), TINY.inputs(1))["params"]
    params = draw(shapes)
    rng = np.random.default_rng(0)
    attention = {f"self_attn.{name}_proj": (40, 40) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (64, 40), "mlp.up_proj": (64, 40), "mlp.down_proj": (40, 64)}
    norms = {"input_layernorm": (40,), "post_attention_layernorm": (40,)}
    teacher = {
        f"model.layers.{i}.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(3)
        for name, shape in (attention | mlp | norms).items()
    }
    state = table(TINY).save(weight_selection(params, teacher, TINY))
    fused = np.concatenate(
        [teacher[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    )
    np.testing.assert_array_equal(state["blocks.1.attn.qkv.weight"], selected(fused, (48, 16)))
    up = teacher["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(state["blocks.0.mlp.fc3.weight"], selected(up, (32, 16)))
    before = table(TINY).save(params)
    for key in ("blocks.1.attn.qkv.bias", "pos_embed", "head.weight", "norm.weight"):
        np.testing.assert_array_equal(state[key], before[key])
    del teacher["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.fc3\.weight cannot be made"):
        weight_selection(params, teacher, TINY)
    with pytest.raises(ValueError, match="none shorter"):
        selected(np.zeros((4, 8)), (5, 8))


def test_hidden_widths_and_wrong_sizes():
    assert [hidden_width(width) for width in (192, 384, 768, 1024)] == [512, 1024, 2048, 2816]
    with pytest.raises(ValueError, match="want a multiple of patch_size = 4"):
        dataclasses.replace(TINY.tower, image_size=18)
    with pytest.raises(ValueError, match="multiples of 4"):
        TINY.build().init(jax.random.key(0), {"pixels": pixels(18, 16)})
    with pytest.raises(ValueError, match=r"taps \[3\]: want 0 to 2"):
        TINY.build().init(jax.random.key(0), {"pixels": pixels(16, 16)}, taps=(3,))
