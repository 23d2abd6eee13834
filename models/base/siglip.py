"""SigLIP and, in fixed resolutions, SigLIP 2: pairs of image and text judged one by one.

Follows: arXiv:2303.15343, arXiv:2502.14786. The checkpoints of SigLIP 2 in a fixed resolution have
the `model_type` of SigLIP. Those in native resolution (NaFlex) are another model.
"""

from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.dual import DualConfig, dual_table
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.hub import read_siglip_vision, siglip_vit
from zoo.models.parts.towers.vit import ViTConfig


def read(fields: Fields) -> DualConfig:
    """The configuration that a `config.json` of SigLIP describes."""
    text_fields = fields.sub("text_config")
    width = text_fields.take("hidden_size", 768)
    embedding_dim = text_fields.take("projection_size", width)
    vision, text = read_siglip_vision(fields.sub("vision_config")), read_text(text_fields)
    if not vision.attention_pool:
        raise UsageError(f"{fields.name}: vision_use_head is False, so there is no image embedding")
    fields.done()
    return _pair(vision, text, embedding_dim)


def read_text(fields: Fields) -> TextConfig:
    """The text tower that a `text_config` describes, without the head."""
    fields.want("hidden_act", "gelu_pytorch_tanh")
    config = _text(
        vocab_size=fields.take("vocab_size", 32_000),
        max_length=fields.take("max_position_embeddings", 64),
        width=fields.take("hidden_size", 768),
        depth=fields.take("num_hidden_layers", 12),
        num_heads=fields.take("num_attention_heads", 12),
        mlp_dim=fields.take("intermediate_size", 3072),
        norm_eps=fields.take("layer_norm_eps", 1e-6),
    )
    fields.ignore("projection_size")  # of the head
    fields.done()
    return config


def refuse_native(fields: Fields) -> DualConfig:
    """Say that SigLIP 2 in native resolution is not here.

    Raises:
      UsageError: always.
    """
    raise UsageError(
        f"{fields.name}: model_type 'siglip2' is SigLIP 2 in native resolution (NaFlex), which "
        "this zoo does not have; take a checkpoint of SigLIP 2 in a fixed resolution, such as "
        "google/siglip2-base-patch16-224"
    )


def _text(**sizes: Any) -> TextConfig:
    fixed = {"activation": "gelu_tanh", "causal": False, "pool": "last"}
    return TextConfig(**{"max_length": 64, "norm_eps": 1e-6} | fixed | sizes)


def _pair(vision: ViTConfig, text: TextConfig, embedding_dim: int) -> DualConfig:
    return DualConfig(
        vision=vision,
        text=text,
        embedding_dim=embedding_dim,
        project_image=False,
        text_bias=True,
        pairing="sigmoid",
    )


_BASE = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
_LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
_SO400M = {"width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304}
_GIANT = {"width": 1536, "depth": 40, "num_heads": 16, "mlp_dim": 6144}


def _size(
    size: dict[str, int],
    patch_size: int,
    image_size: int,
    *,
    vocab_size: int = 32_000,
    max_length: int = 64,
    text: dict[str, int] | None = None,
) -> DualConfig:
    """Both towers of one size, or the text tower of another."""
    return _pair(
        siglip_vit(attention_pool=True, image_size=image_size, patch_size=patch_size, **size),
        _text(vocab_size=vocab_size, max_length=max_length, **(text or size)),
        size["width"],
    )


def _second(
    size: dict[str, int], patch_size: int, image_size: int, text: dict[str, int] | None = None
) -> DualConfig:
    """A size of SigLIP 2, which has the vocabulary of Gemma."""
    return _size(size, patch_size, image_size, vocab_size=256_000, text=text)


# Sizes: config.json of google/siglip-* and google/siglip2-*.
VARIANTS = {
    "siglip_base_patch16_224": _size(_BASE, 16, 224),
    "siglip_base_patch16_256": _size(_BASE, 16, 256),
    "siglip_base_patch16_256_multilingual": _size(_BASE, 16, 256, vocab_size=250_000),
    "siglip_base_patch16_384": _size(_BASE, 16, 384),
    "siglip_base_patch16_512": _size(_BASE, 16, 512),
    "siglip_large_patch16_256": _size(_LARGE, 16, 256),
    "siglip_large_patch16_384": _size(_LARGE, 16, 384),
    "siglip_so400m_patch14_224": _size(_SO400M, 14, 224, max_length=16),
    "siglip_so400m_patch14_384": _size(_SO400M, 14, 384),
    "siglip2_base_patch32_256": _second(_BASE, 32, 256),
    "siglip2_base_patch16_224": _second(_BASE, 16, 224),
    "siglip2_base_patch16_256": _second(_BASE, 16, 256),
    "siglip2_base_patch16_384": _second(_BASE, 16, 384),
    "siglip2_base_patch16_512": _second(_BASE, 16, 512),
    "siglip2_large_patch16_256": _second(_LARGE, 16, 256),
    "siglip2_large_patch16_384": _second(_LARGE, 16, 384),
    "siglip2_large_patch16_512": _second(_LARGE, 16, 512),
    "siglip2_so400m_patch14_224": _second(_SO400M, 14, 224),
    "siglip2_so400m_patch14_384": _second(_SO400M, 14, 384),
    "siglip2_so400m_patch16_256": _second(_SO400M, 16, 256),
    "siglip2_so400m_patch16_384": _second(_SO400M, 16, 384),
    "siglip2_so400m_patch16_512": _second(_SO400M, 16, 512),
    "siglip2_giant_patch16_256": _second(_GIANT, 16, 256, _SO400M),
    "siglip2_giant_patch16_384": _second(_GIANT, 16, 384, _SO400M),
    "siglip_tiny": _pair(
        siglip_vit(
            attention_pool=True,
            image_size=16,
            patch_size=8,
            width=32,
            depth=2,
            num_heads=2,
            mlp_dim=48,
        ),
        _text(vocab_size=64, max_length=12, width=24, depth=2, num_heads=2, mlp_dim=40),
        32,
    ),
}

register_base(
    Base(
        slug="siglip",
        title="SigLIP and SigLIP 2: pairs of image and text, judged one by one",
        paper="arXiv:2303.15343",
        variants=VARIANTS,
        table=dual_table,
        hf={"siglip": read, "siglip2": refuse_native},
    )
)
