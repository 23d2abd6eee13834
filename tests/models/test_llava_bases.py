"""The LLaVA family from the configurations of the hub: what is read, what is refused."""

import copy

import pytest

import zoo
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields

# What the hub's files say, without their harmless fields.
CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32_000,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1_000_000.0,
    "sliding_window": 32_768,
    "use_sliding_window": False,
}
SMALL = {
    **QWEN2,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32_000,
    "pad_token_id": 32_001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32_064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32_064,
}
NEXT = {
    **LLAVA,
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "text_config": {
        "intermediate_size": 14_336,
        "max_position_embeddings": 32_768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "vocab_size": 32_064,
    },
    "use_image_newline_parameter": True,
}
ONEVISION = {
    "model_type": "llava_onevision",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "image_token_index": 151_646,
    "projector_hidden_act": "gelu",
    "text_config": {**SMALL, "tie_word_embeddings": True, "vocab_size": 152_000},
    "tie_word_embeddings": False,
    "use_image_newline_parameter": True,
    "video_token_index": 151_647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
INTERNVL = {
    "model_type": "internvl",
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "image_token_id": 151_667,
    "projector_hidden_act": "gelu",
    "text_config": {
        **SMALL,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 151_674,
    },
    "vision_config": {
        "attention_bias": True,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": [448, 448],
        "initializer_factor": 0.1,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 0.1,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": [14, 14],
        "projection_dropout": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
FILES = {
    "llava_1_5_7b": LLAVA,
    "llava_next_mistral_7b": NEXT,
    "llava_onevision_qwen2_0_5b": ONEVISION,
    "internvl3_1b": INTERNVL,
}


def read(values):
    return registry.read_hf(Fields(values["model_type"], values))


def changed(values, path, new):
    """`values` with another value at a dotted path."""
    values = copy.deepcopy(values)
    *parents, name = path.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[name] = new
    return values


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_hub_is_the_published_size(name):
    assert read(FILES[name]) == registry.config(name)


@pytest.mark.parametrize("name", ["llava_1_5_7b", "llava_next_mistral_7b"])
def test_parts_that_a_file_leaves_out(name):
    values = {k: v for k, v in FILES[name].items() if k != "vision_config"}
    assert read(values) == registry.config(name)


REFUSED = [
    (LLAVA, "mm_patch_merge_type", "flat", "mm_patch_merge_type"),
    (LLAVA, "vision_config.model_type", "pixtral", "no vision tower"),
    (LLAVA, "vision_config.num_channels", 1, "num_channels"),
    (LLAVA, "vision_feature_select_strategy", "cls_patch", "select_strategy"),
    (LLAVA, "projector_hidden_act", "relu", "projector_hidden_act"),
    (LLAVA, "text_config", {"model_type": "bert"}, "no decoder"),
    (NEXT, "use_image_newline_parameter", False, "newline"),
    (NEXT, "vision_feature_select_strategy", "full", "class tokens"),
    (ONEVISION, "vision_feature_select_strategy", "default", "drops the first token"),
    (ONEVISION, "vision_aspect_ratio", "pad", "anyres_max_9"),
    (INTERNVL, "downsample_ratio", 0.4, "downsample_ratio"),
    (INTERNVL, "vision_config.image_size", [448, 224], "square"),
    (INTERNVL, "vision_feature_layer", [-1, -2], "one layer"),
]


@pytest.mark.parametrize(("values", "path", "new", "match"), REFUSED)
def test_what_is_not_understood_raises(values, path, new, match):
    with pytest.raises(UsageError, match=match):
        read(changed(values, path, new))


def test_hidden_states_that_a_tower_does_not_have():
    with pytest.raises(ValueError, match="hidden states"):
        zoo.create("llava_tiny", vision_layer=-5)
    with pytest.raises(ValueError, match="class token"):
        zoo.create("llava_onevision_tiny", keep_class=True)


def test_names():
    """Sizes are made by name, and their fields are found."""
    model = zoo.create("llava_1_5_7b", bias=False)
    assert model.config.decoder.vocab_size == 32_064 and not model.config.connector.bias
    assert registry.config("llava_next_vicuna_7b").slots == 2928
