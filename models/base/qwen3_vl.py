"""Qwen3-VL. Follows: arXiv:2511.21631 and `Qwen3VLForConditionalGeneration` of transformers.

What differs from Qwen2-VL: a tower with learned positions beside the rotary ones, whose layers also
reach the first layers of the decoder (DeepStack, arXiv:2406.04334); the decoder of Qwen3, with the
axes of its rotary positions taking turns; and videos that tell their time in text. The models with
experts are not here.
"""

import math
from dataclasses import replace

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig, read_qwen_vl, tower_fields
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.decoders.reading import read_qk_normed, read_rope
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.towers.qwen_vit import QwenViTConfig, merger_table, tower_table

TOWER = QwenViTConfig(
    patch_size=16,
    patch_bias=True,
    table_side=48,
    width=1152,
    depth=27,
    mlp_dim=4304,
    activation="gelu_tanh",
)
"""The tower of the 8B and 32B models."""

SMALL_TOWER = replace(TOWER, width=1024, depth=24, mlp_dim=4096)
"""The tower of the 2B and 4B models."""

QWEN3_8B = DecoderConfig(
    vocab_size=151_936,
    width=4096,
    depth=36,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=12_288,
    head_dim=None,
    context=262_144,
    rope=RopeConfig(5e6, sections=(24, 20, 20), interleaved=True),
    norm_eps=1e-6,
    qk_norm=True,
)
"""The language model of the 8B model."""


def read(fields: Fields) -> QwenVLConfig:
    """A `config.json` of `qwen3_vl`."""
    vision = fields.sub("vision_config")
    vision.want("hidden_act", "gelu_pytorch_tanh")
    rows = vision.take("num_position_embeddings", 2304)
    side = math.isqrt(rows)
    if side**2 != rows:
        raise UsageError(
            f"{vision.name}: num_position_embeddings is {rows}; want a square number, the cells of "
            "a square table"
        )
    tower = QwenViTConfig(
        **tower_fields(vision, depth=27, patch_size=16),
        patch_bias=True,
        table_side=side,
        width=vision.take("hidden_size", 1152),
        mlp_dim=vision.take("intermediate_size", 4304),
        activation="gelu_tanh",
    )
    levels = tuple(layer + 1 for layer in vision.take("deepstack_visual_indexes", (8, 16, 24)))
    tokens = vision.take("out_hidden_size", 3584)
    vision.done()
    return read_qwen_vl(fields, tower, tokens, _read_text, levels=levels, time_in_text=True)


def _read_text(fields: Fields) -> DecoderConfig:
    """The language model."""
    context = fields.take("max_position_embeddings", 128_000)
    rope = read_rope(
        fields,
        context=context,
        theta=5e5,
        kinds=("default", "linear", "yarn"),
        sections=(24, 20, 20),
        interleaved=True,
    )
    return read_qk_normed(fields, context=context, rope=rope)


def table(config: QwenVLConfig) -> Table:
    """Keys in the hub's checkpoints: `model.visual.…`, `model.language_model.…`, `lm_head.…`."""
    names = {"up": "linear_fc1", "down": "linear_fc2"}
    merger = merger_table(config.tower, norm="norm", **names)
    tower = tower_table(config.tower, **{name: f"mlp.{key}" for name, key in names.items()})
    rows = tower.under("tower") + merger.under("connector", "merger.")
    for i in range(len(config.levels)):
        rows += merger.under(f"level_{i}", f"deepstack_merger_list.{i}.")
    decoder = decoder_table(config.decoder, "model.language_model.")
    return rows.under(theirs="model.visual.") + decoder.under("decoder")


def _sized(
    tower: QwenViTConfig,
    width: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    levels: tuple[int, ...],
    *,
    tied: bool = False,
) -> QwenVLConfig:
    """What all dense Qwen3-VL models share."""
    decoder = replace(
        QWEN3_8B,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        head_dim=None if width == 128 * num_heads else 128,
        tie_embeddings=tied,
    )
    return QwenVLConfig(tower, decoder, levels, time_in_text=True)


_FEW, _MANY = (6, 12, 18), (9, 17, 25)

# Sizes: config.json of Qwen/Qwen3-VL-{8B,2B,4B,32B}-Instruct.
VARIANTS = {
    "qwen3_vl_8b": _sized(TOWER, 4096, 36, 32, 12_288, _MANY),
    "qwen3_vl_2b": _sized(SMALL_TOWER, 2048, 28, 16, 6144, _FEW, tied=True),
    "qwen3_vl_4b": _sized(SMALL_TOWER, 2560, 36, 32, 9728, _FEW, tied=True),
    "qwen3_vl_32b": _sized(TOWER, 5120, 64, 64, 25_600, _MANY),
    "qwen3_vl_tiny": QwenVLConfig(
        tower=replace(
            TOWER, patch_size=4, table_side=5, width=16, depth=4, num_heads=2, mlp_dim=24
        ),
        decoder=replace(
            QWEN3_8B,
            vocab_size=512,
            width=32,
            depth=4,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            rope=RopeConfig(sections=(2, 1, 1), interleaved=True),
        ),
        levels=(1, 3),
        image_id=508,
        video_id=509,
        time_in_text=True,
        image_size=32,
    ),
}

register_base(
    Base(
        "qwen3_vl",
        "Qwen3-VL: vision-language model in native resolution with several levels of its tower",
        "arXiv:2511.21631",
        VARIANTS,
        table=table,
        hf={"qwen3_vl": read},
    )
)
