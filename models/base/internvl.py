"""InternVL 3 as the hub's `internvl`: InternViT, pixel shuffle and Qwen2.5.

A picture is several tiles (`zoo.processors.tiling.tile_grid`), whose tokens are read one tile after
the other.

Follows: arXiv:2504.10479.
"""

import math

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table, norm_rows
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import (
    ACTIVATIONS,
    MODULES,
    RENAMES,
    projector_rows,
    read_decoder,
)
from zoo.models.parts.connect.pixel_shuffle import PixelShuffle
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.layers.rope import DynamicNTK, RopeConfig
from zoo.models.parts.towers.hub import read_side
from zoo.models.parts.towers.vit import Names, ViTConfig, embeddings_table


def read(fields: Fields) -> LlavaConfig:
    """The configuration that a `config.json` of InternVL describes."""
    # Files that say nothing of the whole model, but that the text is not tied, carry a head.
    text_says = fields.sub("text_config").take("tie_word_embeddings", True)
    tied = fields.take("tie_word_embeddings", text_says)
    tower = read_vision(fields.sub("vision_config", model_type="internvl_vision"))
    fields.want("vision_feature_select_strategy", "default")
    layer = fields.take("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise UsageError(f"{fields.name}: vision_feature_layer is {layer!r}; want one layer")
    act = fields.want("projector_hidden_act", *ACTIVATIONS)
    config = LlavaConfig(
        tower=tower,
        connector=PixelShuffle(_factor(fields), ACTIVATIONS[act]),
        decoder=read_decoder(fields, default="qwen2", tied=tied),
        vision_layer=None if layer == -1 else layer,
        image_id=fields.take("image_token_id", 151_667),
    )
    fields.ignore("image_seq_length")  # the processor counts tokens
    fields.done()
    return config


def _factor(fields: Fields) -> int:
    ratio = fields.take("downsample_ratio", 0.5)
    factor = round(1 / ratio) if ratio > 0 else 0
    if factor < 1 or not math.isclose(factor * ratio, 1):
        raise UsageError(f"{fields.name}: downsample_ratio is {ratio!r}; want 1, 1/2, 1/3, ...")
    return factor


def read_vision(fields: Fields) -> ViTConfig:
    """The InternViT that a `vision_config` describes."""
    if fields.model_type != "internvl_vision":
        raise UsageError(f"{fields.name}: model_type {fields.model_type!r}; want 'internvl_vision'")
    fields.want("num_channels", 3)
    fields.want("use_absolute_position_embeddings", True)
    config = ViTConfig(
        image_size=read_side(fields, "image_size", 448),
        patch_size=read_side(fields, "patch_size", 14),
        width=fields.take("hidden_size", 1024),
        depth=fields.take("num_hidden_layers", 24),
        num_heads=fields.take("num_attention_heads", 16),
        mlp_dim=fields.take("intermediate_size", 4096),
        activation=ACTIVATIONS[fields.want("hidden_act", *ACTIVATIONS)],
        norm="layer"
        if fields.want("norm_type", "layer_norm", "rms_norm") == "layer_norm"
        else "rms",
        norm_eps=fields.take("layer_norm_eps", 1e-6),
        mask_token=fields.take("use_mask_token", False),
        input_norm=False,
        final_norm=not fields.take("use_mean_pooling", True),
        qkv_bias=fields.take("attention_bias", False),
        qk_norm=fields.take("use_qk_norm", False),
        layer_scale=fields.take("layer_scale_init_value", 0.1),
    )
    fields.ignore("projection_dropout")
    fields.done()
    return config


_LAYER: Names = {
    "attn_norm": "layernorm_before",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "out": "attention.projection_layer",
    "attn_gain": "lambda_1",
    "mlp_norm": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "mlp_gain": "lambda_2",
}


def table(config: LlavaConfig) -> Table:
    """Keys of the hub's `internvl` checkpoints, as transformers 5 writes them."""
    projector = projector_rows(bias=True) + Table(tuple(norm_rows("norm", "layer_norm")))
    return (
        embeddings_table(config.tower, _LAYER).under("tower", "vision_tower.")
        + projector.under("connector", "multi_modal_projector.")
        + decoder_table(config.decoder).under("decoder", "language_model.")
    )


def _vit(image_size: int, **sizes: int) -> ViTConfig:
    return ViTConfig(
        image_size=image_size,
        **sizes,
        activation="gelu",
        norm_eps=1e-6,
        input_norm=False,
        final_norm=False,
        layer_scale=0.1,
    )


_VIT_300M = _vit(448, patch_size=14, width=1024, depth=24, num_heads=16, mlp_dim=4096)


def _size(width: int, depth: int, num_heads: int, num_kv_heads: int, mlp_dim: int) -> LlavaConfig:
    decoder = DecoderConfig(
        vocab_size=151_674,
        width=width,
        depth=depth,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        context=32_768,
        rope=RopeConfig(theta=1e6, scaling=DynamicNTK(factor=2.0, context=32_768)),
        norm_eps=1e-6,
        qkv_bias=True,
    )
    return LlavaConfig(_VIT_300M, PixelShuffle(), decoder, vision_layer=None, image_id=151_667)


# Sizes: config.json of OpenGVLab/InternVL3-{1B,2B,8B,14B}-hf, and arXiv:2504.10479, Table 1.
VARIANTS = {
    "internvl3_8b": _size(3584, 28, 28, 4, 18_944),
    "internvl3_1b": _size(896, 24, 14, 2, 4864),
    "internvl3_2b": _size(1536, 28, 12, 2, 8960),
    "internvl3_14b": _size(5120, 48, 40, 8, 13_824),
    "internvl_tiny": LlavaConfig(
        tower=_vit(16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32),
        connector=PixelShuffle(),
        decoder=DecoderConfig(
            vocab_size=320,
            width=24,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=32,
            norm_eps=1e-6,
            qkv_bias=True,
        ),
        vision_layer=None,
        image_id=3,
        num_images=2,
        text_tokens=12,
    ),
}

register_base(
    Base(
        slug="internvl",
        title="InternVL: InternViT, pixel shuffle and a language model",
        paper="arXiv:2504.10479",
        variants=VARIANTS,
        table=table,
        hf={"internvl": read},
        renames=RENAMES,
        modules=MODULES,
    )
)
