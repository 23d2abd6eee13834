"""Qwen2.5-VL. Follows: arXiv:2502.13923 and `Qwen2_5_VLForConditionalGeneration` of transformers.

What differs from Qwen2-VL: a tower with windows, RMS norms and gated MLPs, and temporal positions
in proportion to time.
"""

from dataclasses import replace

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.qwen_vl import (
    MODULES,
    QWEN2_7B,
    RENAMES,
    QwenVLConfig,
    qwen_vl_table,
    read_qwen_vl,
    tower_fields,
)
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.towers.qwen_vit import QwenViTConfig

TOWER = QwenViTConfig(
    mlp_dim=3420,
    activation="silu",
    gated=True,
    norm="rms",
    window_size=112,
    full_layers=(7, 15, 23, 31),
)
"""The tower of the 3B and 7B models."""


def read(fields: Fields) -> QwenVLConfig:
    """A `config.json` of `qwen2_5_vl`."""
    vision = fields.sub("vision_config")
    tower = QwenViTConfig(
        **tower_fields(vision),
        width=vision.take("hidden_size", 3584),
        mlp_dim=vision.take("intermediate_size", 3420),
        activation=vision.want("hidden_act", "silu"),
        gated=True,
        norm="rms",
        window_size=vision.take("window_size", 112),
        full_layers=tuple(vision.take("fullatt_block_indexes", (7, 15, 23, 31))),
    )
    tokens, pace = vision.take("out_hidden_size", 3584), vision.take("tokens_per_second", 4)
    vision.done()
    return read_qwen_vl(fields, tower, tokens, tokens_per_second=float(pace))


# Sizes: config.json of Qwen/Qwen2.5-VL-{7B,3B,32B,72B}-Instruct.
VARIANTS = {
    "qwen2_5_vl_7b": QwenVLConfig(TOWER, tokens_per_second=2.0),
    "qwen2_5_vl_3b": QwenVLConfig(
        TOWER,
        replace(
            QWEN2_7B,
            vocab_size=151_936,
            width=2048,
            depth=36,
            num_heads=16,
            num_kv_heads=2,
            mlp_dim=11_008,
            context=128_000,
            tie_embeddings=True,
        ),
        tokens_per_second=2.0,
    ),
    "qwen2_5_vl_32b": QwenVLConfig(
        replace(TOWER, mlp_dim=3456),
        replace(QWEN2_7B, width=5120, depth=64, num_heads=40, num_kv_heads=8, mlp_dim=27_648),
        tokens_per_second=2.0,
    ),
    "qwen2_5_vl_72b": QwenVLConfig(
        replace(TOWER, mlp_dim=3456),
        replace(QWEN2_7B, width=8192, depth=80, num_heads=64, num_kv_heads=8, mlp_dim=29_568),
        tokens_per_second=2.0,
    ),
    "qwen2_5_vl_tiny": QwenVLConfig(
        tower=replace(
            TOWER,
            patch_size=4,
            width=16,
            depth=3,
            num_heads=2,
            mlp_dim=24,
            window_size=16,
            full_layers=(1,),
        ),
        decoder=replace(
            QWEN2_7B,
            vocab_size=512,
            width=32,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            rope=RopeConfig(sections=(1, 1, 2)),
        ),
        image_id=508,
        video_id=509,
        tokens_per_second=2.0,
        image_size=32,
    ),
}

register_base(
    Base(
        "qwen2_5_vl",
        "Qwen2.5-VL: vision-language model in native resolution with windows",
        "arXiv:2502.13923",
        VARIANTS,
        table=qwen_vl_table,
        hf={"qwen2_5_vl": read},
        renames=RENAMES,
        modules=MODULES,
    )
)
