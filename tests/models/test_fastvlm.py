"""FastVLM: folding changes nothing, few tokens of large pictures, conversion without statistics."""

import json
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import zoo
from tests.models.draw import draw
from zoo.convert.place import abstract_variables
from zoo.loaded import Loaded
from zoo.models.base import hub_fastvlm
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.parts.towers.fastvit import FastViTConfig, fuse
from zoo.models.vlm.fastvlm import table

OFFICIAL = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 896,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "mm_hidden_size": 3072,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "mobileclip_l_1024",
    "model_type": "llava_qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""What an official `config.json` says."""

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


def test_an_official_file():
    """The released sizes; pictures of 1024 pixels."""
    found = registry.read_hf(Fields("llava_qwen2", OFFICIAL))
    assert found.tower == FastViTConfig(image_size=1024) and found.tile_tokens == 256
    want = registry.config("fastvlm_0_5b").decoder
    assert found.decoder == replace(want, tie_embeddings=False, context=32_768)
    assert found.image_id == 151_646


def test_an_official_checkpoint(tmp_path, monkeypatch):
    """Its names are understood, its CLIP head is passed over; the same logits as where the table of
    the system reads it, which folds what this one keeps.
    """
    sizes = {"depths": (1, 1, 2, 1, 1), "widths": (8, 8, 16, 32, 32), "mlp_ratios": (2,) * 5}
    monkeypatch.setitem(hub_fastvlm.TOWERS, "mobileclip_l", FastViTConfig(**sizes))
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_window_layers": 2}
    pictures = {"mm_vision_tower": "mobileclip_l_128", "mm_hidden_size": 64, "image_token_index": 3}
    file = OFFICIAL | small | heads | pictures
    config = registry.read_hf(Fields("llava_qwen2", file))
    state = table(config).save(draw(abstract_variables(config)))
    assert "model.vision_tower.vision_tower.model.network.9.reparam_conv.weight" in state
    head = {"model.vision_tower.vision_tower.model.head.proj": np.zeros((64, 4), np.float32)}
    save_file(state | head, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(file))

    loaded = zoo.load(tmp_path)
    assert loaded.config == config and loaded.stats
    batch = {
        name: np.ones(leaf.shape, leaf.dtype) if leaf.dtype == bool else np.zeros(leaf.shape, "i4")
        for name, leaf in config.inputs(1).items()
    }
    batch["pixels"] = np.random.default_rng(0).random(batch["pixels"].shape).astype(np.float32)
    ids = np.arange(4, 4 + batch["ids"].shape[1], dtype=np.int32)
    ids[2] = config.image_id
    batch["ids"][:] = ids
    folded = replace(config, tower=replace(config.tower, form="folded"))
    made = nn.unbox(jax.eval_shape(folded.build().init, jax.random.key(0), folded.inputs(1)))
    params = table(folded).load(state | head, made["params"])
    other = Loaded(tmp_path, folded, folded.build(), params, None, {})
    want = np.asarray(other.logits(batch))
    assert np.abs(want).max() > 0.1
    atol = 1e-3 * np.abs(want).max()  # float32, folded and not
    np.testing.assert_allclose(loaded.logits(batch), want, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "reads mobileclip_l_<side"),
        ({"mm_vision_tower": "mobileclip_l_"}, "reads mobileclip_l_<side"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"image_aspect_ratio": None}, "lacks 'image_aspect_ratio'"),
        ({"mm_hidden_size": 768}, "mm_hidden_size is 768; this zoo computes 3072 only"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type = 'perceiver'"),
    ],
)
def test_what_an_official_file_may_not_say(changes, message):
    with pytest.raises(UsageError, match=message):
        registry.read_hf(Fields("llava_qwen2", OFFICIAL | changes))


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
