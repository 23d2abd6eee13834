"""The supervised vision transformer, in the layout of Hugging Face.

Follows: arXiv:2010.11929. The same weights in timm's layout are in `timm_vit`.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table, read_classes
from zoo.models.parts.towers.hub import read_sizes
from zoo.models.parts.towers.vit import HF_LAYER, ViTConfig, embeddings_table


def read(fields: Fields) -> ClassifierConfig:
    """The configuration that a `config.json` of ViT describes: an encoder with its pooler, or a
    classifier.

    Raises:
      UsageError: the checkpoint is one of masked image modelling.
    """
    if "ViTForMaskedImageModeling" in fields.take("architectures", ()):
        raise UsageError(f"{fields.name}: this zoo has no masked image modelling with ViT")
    sizes = read_sizes(fields, norm_eps=1e-12)
    tower = _tower(mlp_dim=fields.take("intermediate_size", 3072), **sizes)
    fields.want("pooler_act", "tanh")
    fields.want("pooler_output_size", tower.width)
    fields.ignore("encoder_stride")  # of masked image modelling
    num_classes = read_classes(fields)
    fields.done()
    return ClassifierConfig(tower, pooler=not num_classes, num_classes=num_classes)


def fit(config: ClassifierConfig, keys: Collection[str]) -> ClassifierConfig:
    """The configuration without the pooler if the checkpoint has none."""
    pooler = config.pooler and "pooler.dense.weight" in keys
    return dataclasses.replace(config, pooler=pooler)


def table(config: ClassifierConfig) -> Table:
    """Keys of the hub's checkpoints."""
    body = embeddings_table(config.tower, HF_LAYER)
    body = body.under("tower", "vit." if config.num_classes else "")
    return body + head_table(config, pooler="pooler.dense", head="classifier")


def _tower(**sizes: Any) -> ViTConfig:
    sizes = {"activation": "gelu", "norm_eps": 1e-12} | sizes
    return ViTConfig(input_norm=False, position_resize="bicubic", **sizes)


_B = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
_L = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
_H = {"width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120}


def _classifier(size: dict[str, int], patch_size: int, image_size: int) -> ClassifierConfig:
    """Fine-tuned on ImageNet-1k."""
    tower = _tower(image_size=image_size, patch_size=patch_size, **size)
    return ClassifierConfig(tower, num_classes=1000)


def _encoder(size: dict[str, int], patch_size: int) -> ClassifierConfig:
    """Trained on ImageNet-21k, released with the pooler and without the classes."""
    return ClassifierConfig(_tower(image_size=224, patch_size=patch_size, **size), pooler=True)


# Sizes: config.json of google/vit-*.
VARIANTS = {
    "vit_b16": _classifier(_B, 16, 224),
    "vit_b16.384": _classifier(_B, 16, 384),
    "vit_b32.384": _classifier(_B, 32, 384),
    "vit_l16": _classifier(_L, 16, 224),
    "vit_l16.384": _classifier(_L, 16, 384),
    "vit_l32.384": _classifier(_L, 32, 384),
    "vit_b16.in21k": _encoder(_B, 16),
    "vit_b32.in21k": _encoder(_B, 32),
    "vit_l16.in21k": _encoder(_L, 16),
    "vit_l32.in21k": _encoder(_L, 32),
    "vit_h14.in21k": _encoder(_H, 14),
    "vit_tiny": ClassifierConfig(
        _tower(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32),
        num_classes=5,
    ),
}

register_base(
    Base(
        slug="vit",
        title="ViT: the supervised vision transformer",
        paper="arXiv:2010.11929",
        variants=VARIANTS,
        table=table,
        hf={"vit": read},
        fit=fit,
    )
)
