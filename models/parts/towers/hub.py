"""Reading the `vision_config` of a tower that is a part of many architectures on the hub.

Defaults are those of the configuration classes of transformers.
"""

from collections.abc import Callable
from typing import Any

from zoo.models.core.card import nearest
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.parts.towers.vit import ViTConfig


def read_clip_vision(fields: Fields) -> ViTConfig:
    """The vision tower of CLIP (`clip_vision_model`); its key table is `clip_table`."""
    fields.want("num_channels", 3)
    config = ViTConfig(
        image_size=fields.take("image_size", 224),
        patch_size=fields.take("patch_size", 32),
        width=fields.take("hidden_size", 768),
        depth=fields.take("num_hidden_layers", 12),
        num_heads=fields.take("num_attention_heads", 12),
        mlp_dim=fields.take("intermediate_size", 3072),
        activation=fields.want("hidden_act", "quick_gelu", "gelu"),
        norm_eps=fields.take("layer_norm_eps", 1e-5),
    )
    fields.ignore("projection_dim", "vocab_size")  # of the whole model, of its text
    fields.done()
    return config


def siglip_vit(*, norm_eps: float = 1e-6, attention_pool: bool, **sizes: int) -> ViTConfig:
    """A vision tower of SigLIP, of which the pooling head may be left out."""
    return ViTConfig(
        activation="gelu_tanh",
        norm_eps=norm_eps,
        class_token=False,
        input_norm=False,
        attention_pool=attention_pool,
        trim=True,
        **sizes,
    )


def read_siglip_vision(fields: Fields) -> ViTConfig:
    """The vision tower of SigLIP (`siglip_vision_model`); its key table is `clip_table`."""
    fields.want("num_channels", 3)
    fields.want("hidden_act", "gelu_pytorch_tanh")
    config = siglip_vit(
        image_size=fields.take("image_size", 224),
        patch_size=fields.take("patch_size", 16),
        width=fields.take("hidden_size", 768),
        depth=fields.take("num_hidden_layers", 12),
        num_heads=fields.take("num_attention_heads", 12),
        mlp_dim=fields.take("intermediate_size", 3072),
        norm_eps=fields.take("layer_norm_eps", 1e-6),
        attention_pool=fields.take("vision_use_head", True),
    )
    fields.done()
    return config


_READERS: dict[str, Callable[[Fields], ViTConfig]] = {
    "clip_vision_model": read_clip_vision,
    "siglip_vision_model": read_siglip_vision,
}


def read_vision(fields: Fields) -> ViTConfig:
    """The vision tower that a `vision_config` with a `model_type` describes.

    Raises:
      UsageError: a tower that this zoo does not have here, with the nearest name.
    """
    if fields.model_type not in _READERS:
        raise UsageError(
            f"{fields.name}: model_type {fields.model_type!r} is no vision tower that this zoo "
            f"reads here{nearest(fields.model_type, list(_READERS))}; it reads "
            + ", ".join(_READERS)
        )
    return _READERS[fields.model_type](fields)


def read_sizes(fields: Fields, *, patch_size: int = 16, norm_eps: float) -> dict[str, Any]:
    """Fields of `ViTConfig` from those that the Hugging Face ViTs of `embeddings_table` share.

    Args:
      fields: of the `config.json`.
      patch_size: the default.
      norm_eps: the default.

    Raises:
      UsageError: images or patches that are no squares, or that have other than three channels.
    """
    fields.want("num_channels", 3)
    return {
        "image_size": read_side(fields, "image_size", 224),
        "patch_size": read_side(fields, "patch_size", patch_size),
        "width": fields.take("hidden_size", 768),
        "depth": fields.take("num_hidden_layers", 12),
        "num_heads": fields.take("num_attention_heads", 12),
        "activation": fields.want("hidden_act", "gelu"),
        "norm_eps": fields.take("layer_norm_eps", norm_eps),
        "qkv_bias": fields.take("qkv_bias", True),
    }


def read_side(fields: Fields, key: str, default: int) -> int:
    """The side of images or patches, which files give as one number or as height and width.

    Raises:
      UsageError: these differ.
    """
    value = fields.take(key, default)
    sides = value if isinstance(value, tuple) else (value,)
    if len(set(sides)) > 1:
        raise UsageError(f"{fields.name}: {key} is {value}; this tower takes squares only")
    return int(sides[0])
