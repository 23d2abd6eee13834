"""LLaVA-OneVision: SigLIP and Qwen2; single pictures in tiles, several pictures, videos.

The tiles of a single picture are those of LLaVA-NeXT, with the grid reduced where it is large;
each of several pictures is one tile; the grids of a video's frames are halved. All of that is in
the batch's `layout` and `blend`: `anyres`, `whole_tiles` and `pooled_frames` of
`zoo.processors.tiling`. A video stands at an image placeholder.

Follows: arXiv:2408.03326.
"""

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import (
    MODULES,
    RENAMES,
    hub_table,
    read_decoder,
    read_llava,
    with_tiles,
)
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.towers.hub import siglip_vit

SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
"""The `vision_config` of a file without one: SigLIP so400m/14 at 384 pixels, one layer less."""


RESOLUTIONS = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))
"""Height and width that pictures are fitted into, of files that name none."""


def read(fields: Fields) -> LlavaConfig:
    """The configuration that a `config.json` of LLaVA-OneVision describes."""
    fields.want("use_image_newline_parameter", True)
    fields.ignore("video_token_index", "video_token_id")  # a video stands at an image placeholder
    resolutions = fields.take("image_grid_pinpoints", RESOLUTIONS)
    most = fields.take("vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_")
    if not most.isdecimal():
        raise UsageError(f"{fields.name}: vision_aspect_ratio ends in {most!r}; want anyres_max_9")
    tied = fields.take("tie_word_embeddings", False)
    config = read_llava(
        fields,
        decoder=read_decoder(fields, default="qwen2", tied=True if tied else None),
        vision=SIGLIP_SO400M,
        strategy="full",
        vision_layer=-1,
        image_id=151_646,
        newline=True,
    )
    fields.done()
    return with_tiles(config, resolutions, int(most))


_SO400M = siglip_vit(
    attention_pool=False,
    image_size=384,
    patch_size=14,
    width=1152,
    depth=26,
    num_heads=16,
    mlp_dim=4304,
)


def _size(decoder: DecoderConfig) -> LlavaConfig:
    config = LlavaConfig(
        tower=_SO400M, decoder=decoder, vision_layer=-1, newline=True, image_id=151_646
    )
    return with_tiles(config, RESOLUTIONS, most=9)


# Sizes: config.json of llava-hf/llava-onevision-qwen2-{0.5b,7b}-ov-hf.
VARIANTS = {
    "llava_onevision_qwen2_7b": _size(
        DecoderConfig(
            vocab_size=152_000,
            width=3584,
            depth=28,
            num_heads=28,
            num_kv_heads=4,
            mlp_dim=18_944,
            context=32_768,
            rope=RopeConfig(theta=1e6),
            norm_eps=1e-6,
            qkv_bias=True,
        )
    ),
    "llava_onevision_qwen2_0_5b": _size(
        DecoderConfig(
            vocab_size=152_000,
            width=896,
            depth=24,
            num_heads=14,
            num_kv_heads=2,
            mlp_dim=4864,
            context=32_768,
            rope=RopeConfig(theta=1e6),
            norm_eps=1e-6,
            qkv_bias=True,
            tie_embeddings=True,
        )
    ),
    "llava_onevision_tiny": LlavaConfig(
        tower=siglip_vit(
            attention_pool=False,
            image_size=16,
            patch_size=4,
            width=16,
            depth=2,
            num_heads=2,
            mlp_dim=32,
        ),
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
        vision_layer=-1,
        newline=True,
        image_id=3,
        num_images=5,
        num_slots=16 + 8 * 9,
        text_tokens=12,
    ),
}

register_base(
    Base(
        slug="llava_onevision",
        title="LLaVA-OneVision: pictures in tiles, several pictures, videos",
        paper="arXiv:2408.03326",
        variants=VARIANTS,
        table=hub_table,
        hf={"llava_onevision": read},
        renames=RENAMES,
        modules=MODULES,
    )
)
