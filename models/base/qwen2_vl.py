"""Qwen2-VL. Follows: arXiv:2409.12191 and `Qwen2VLForConditionalGeneration` of transformers."""

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


def read(fields: Fields) -> QwenVLConfig:
    """A `config.json` of `qwen2_vl`."""
    vision = fields.sub("vision_config")
    width = vision.take("embed_dim", 1280)
    tower = QwenViTConfig(
        **tower_fields(vision),
        width=width,
        mlp_dim=int(width * vision.take("mlp_ratio", 4)),
        activation=vision.want("hidden_act", "quick_gelu"),
    )
    tokens = vision.take("hidden_size", 3584)
    vision.done()
    return read_qwen_vl(fields, tower, tokens)


# Sizes: config.json of Qwen/Qwen2-VL-{7B,2B,72B}-Instruct; the tower is the same in all.
VARIANTS = {
    "qwen2_vl_7b": QwenVLConfig(),
    "qwen2_vl_2b": QwenVLConfig(
        decoder=replace(
            QWEN2_7B,
            vocab_size=151_936,
            width=1536,
            num_heads=12,
            num_kv_heads=2,
            mlp_dim=8960,
            tie_embeddings=True,
        )
    ),
    "qwen2_vl_72b": QwenVLConfig(
        decoder=replace(
            QWEN2_7B, width=8192, depth=80, num_heads=64, num_kv_heads=8, mlp_dim=29_568
        )
    ),
    "qwen2_vl_tiny": QwenVLConfig(
        tower=QwenViTConfig(patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32),
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
        image_size=32,
    ),
}

register_base(
    Base(
        "qwen2_vl",
        "Qwen2-VL: vision-language model in native resolution",
        "arXiv:2409.12191",
        VARIANTS,
        table=qwen_vl_table,
        hf={"qwen2_vl": read},
        renames=RENAMES,
        modules=MODULES,
    )
)
