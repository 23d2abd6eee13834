"""LLaVA-1.5: CLIP, two linear layers and a language model. Follows: arXiv:2310.03744."""

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
)
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.towers.vit import ViTConfig


def read(fields: Fields) -> LlavaConfig:
    """The configuration that a `config.json` of LLaVA describes."""
    tied = fields.take("tie_word_embeddings", False)
    config = read_llava(
        fields,
        decoder=read_decoder(fields, default="llama", tied=True if tied else None),
        vision=CLIP_L,
        vision_layer=-2,
        image_id=32_000,
    )
    fields.done()
    return config


# Sizes: config.json of llava-hf/llava-1.5-{7b,13b}-hf, whose vocabulary has 64 more rows than that
# of Vicuna v1.5.
VARIANTS = {
    "llava_1_5_7b": LlavaConfig(decoder=DecoderConfig(vocab_size=32_064)),
    "llava_1_5_13b": LlavaConfig(
        decoder=DecoderConfig(
            vocab_size=32_064,
            width=5120,
            depth=40,
            num_heads=40,
            num_kv_heads=40,
            mlp_dim=13_824,
        )
    ),
    "llava_tiny": LlavaConfig(
        tower=ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        image_id=3,
        text_tokens=12,
    ),
}

register_base(
    Base(
        slug="llava",
        title="LLaVA-1.5: CLIP, two linear layers and a language model",
        paper="arXiv:2310.03744",
        variants=VARIANTS,
        table=hub_table,
        hf={"llava": read},
        renames=RENAMES,
        modules=MODULES,
    )
)
