"""FastVLM: folding changes nothing, few tokens of large pictures, conversion without statistics."""

from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.parts.towers.fastvit import FastViTConfig, fuse
from zoo.models.vlm.fastvlm import table

ENCODER = registry.config("fastvlm_encoder_tiny")


@pytest.fixture(scope="module")
def trained():
    """Variables with branches."""
    made = jax.eval_shape(ENCODER.build().init, jax.random.key(0), ENCODER.inputs(1))
    return draw(nn.unbox(dict(made)))


def test_folding(trained):
    """Both simpler forms have the parameters that they say, and compute the same."""
    pixels = np.random.default_rng(0).random((2, 50, 64, 3)).astype(np.float32)
    want = ENCODER.build().apply(trained, {"pixels": pixels})
    assert want.features.grid == (4, 4) and want.features.tokens.shape == (2, 16, 96)
    for form in ("released", "folded"):
        config = replace(ENCODER, tower=replace(ENCODER.tower, form=form))
        model = config.build()
        shapes = nn.unbox(dict(jax.eval_shape(model.init, jax.random.key(0), config.inputs(1))))
        found = fuse(trained, form)
        assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)
        again = fuse(fuse(trained), form)
        got = model.apply(again, {"pixels": pixels})
        np.testing.assert_allclose(got.logits, want.logits, rtol=2e-5, atol=2e-5)
    assert "stats" not in found
    with pytest.raises(ValueError, match="form = 'branches': want 'released' or 'folded'"):
        fuse(trained, "branches")


def test_loading_folds(trained):
    """A released encoder becomes the tower of a language model, which has no statistics."""
    released = replace(ENCODER, num_classes=0, tower=replace(ENCODER.tower, form="released"))
    variables = fuse(trained)
    variables["params"] = {"tower": variables["params"]["tower"]}
    state = table(released).save(jax.tree.map(np.asarray, variables))
    config = registry.config("fastvlm_tiny")
    made = nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1)))
    assert set(made) == {"params"}
    whole = table(config).save(draw(made)["params"])
    prefix = "model.vision_tower.vision_tower.model."
    assert {prefix + key for key in state} == {key for key in whole if key.startswith(prefix)}
    whole |= {prefix + key: leaf for key, leaf in state.items()}
    whole[f"{prefix}head.proj"] = np.zeros((96, 4), np.float32)
    found = table(config).load(whole, made["params"])["tower"]
    want = fuse(trained, "folded")["params"]["tower"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, want)


def test_tokens():
    """One for 64 x 64 pixels."""
    for side, tokens in ((256, 16), (512, 64), (768, 144), (1024, 256), (1536, 576)):
        rows, columns = FastViTConfig(image_size=side).grid
        assert rows * columns == tokens
    assert registry.config("fastvlm_7b").tile_tokens == 256


def test_wrong_sizes():
    with pytest.raises(ValueError, match=r"widths \[48\]: want multiples of head_dim = 32"):
        FastViTConfig(depths=(1, 1), widths=(16, 48), mlp_ratios=(1, 1), attention_from=1)
    with pytest.raises(ValueError, match="form = 'whole': want one of branches, released, folded"):
        FastViTConfig(form="whole")
    vlm = replace(registry.config("fastvlm_tiny"), vision_layer=-2)
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in vlm.inputs(1).items()}
    variables = {"params": {"tower": {}}}
    with pytest.raises(ValueError, match="this tower runs whole"):
        vlm.build().apply(variables, batch["pixels"], method="encode_image")
