"""LLaVA-NeXT (LLaVA-1.6): LLaVA-1.5 that sees a picture whole and in tiles, without its padding.

The tiles and the order of their tokens are `zoo.processors.tiling.anyres`.

Follows: arXiv:2310.03744, and https://llava-vl.github.io/blog/2024-01-30-llava-next/.
"""

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import (
    CLIP_L,
    MODULES,
    RENAMES,
    hub_table,
    read_decoder,
    read_llava,
    with_tiles,
)
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.towers.vit import ViTConfig

RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Height and width that pictures are fitted into, of files that name none."""


def read(fields: Fields) -> LlavaConfig:
    """The configuration that a `config.json` of LLaVA-NeXT describes."""
    fields.want("use_image_newline_parameter", True)
    resolutions = fields.take("image_grid_pinpoints", RESOLUTIONS)
    tied = fields.take("tie_word_embeddings", False)
    config = read_llava(
        fields,
        decoder=read_decoder(fields, default="llama", tied=tied),
        vision=CLIP_L,
        vision_layer=-2,
        image_id=32_000,
        newline=True,
    )
    fields.done()
    return with_tiles(config, resolutions)


def _size(decoder: DecoderConfig, image_id: int = 32_000) -> LlavaConfig:
    return with_tiles(LlavaConfig(decoder=decoder, newline=True, image_id=image_id), RESOLUTIONS)


# Sizes: config.json of llava-hf/llava-v1.6-{vicuna-7b, mistral-7b, vicuna-13b, 34b}-hf and
# llava-hf/llama3-llava-next-8b-hf.
VARIANTS = {
    "llava_next_vicuna_7b": _size(DecoderConfig(vocab_size=32_064)),
    "llava_next_mistral_7b": _size(
        DecoderConfig(
            vocab_size=32_064,
            num_kv_heads=8,
            mlp_dim=14_336,
            context=32_768,
            rope=RopeConfig(theta=1e6),
        )
    ),
    "llava_next_llama3_8b": _size(
        DecoderConfig(
            vocab_size=128_320,
            num_kv_heads=8,
            mlp_dim=14_336,
            context=8192,
            rope=RopeConfig(theta=5e5),
        ),
        image_id=128_256,
    ),
    "llava_next_vicuna_13b": _size(
        DecoderConfig(
            vocab_size=32_064,
            width=5120,
            depth=40,
            num_heads=40,
            num_kv_heads=40,
            mlp_dim=13_824,
        )
    ),
    "llava_next_34b": _size(
        DecoderConfig(
            vocab_size=64_064,
            width=7168,
            depth=60,
            num_heads=56,
            num_kv_heads=8,
            mlp_dim=20_480,
            rope=RopeConfig(theta=5e6),
        ),
        image_id=64_000,
    ),
    "llava_next_tiny": LlavaConfig(
        tower=ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        newline=True,
        image_id=3,
        num_images=5,
        num_slots=16 + 8 * 9,
        text_tokens=12,
    ),
}

register_base(
    Base(
        slug="llava_next",
        title="LLaVA-NeXT: LLaVA with tiles of high-resolution pictures",
        paper="arXiv:2310.03744",
        variants=VARIANTS,
        table=hub_table,
        hf={"llava_next": read},
        renames=RENAMES,
        modules=MODULES,
    )
)
