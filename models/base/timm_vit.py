"""The supervised vision transformers of timm: "How to train your ViT", in timm's layout.

Follows: arXiv:2106.10270. `vit_b16_augreg` here is timm's `vit_base_patch16_224` with any of its
weights: `.augreg_in21k_ft_in1k`, `.augreg2_in21k_ft_in1k`, `.augreg_in1k`.
"""

import re

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Row, Table, conv, norm_rows
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.towers.vit import TIMM_LAYER, ViTConfig, layer_rows, ones

_SIZES = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "small": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "base": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "large": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
}


def read(fields: Fields) -> ClassifierConfig:
    """The configuration that timm's `config.json` describes: a name and the number of classes.

    Raises:
      UsageError: the name is not one of those that are here.
    """
    name = fields.take("architecture").partition(".")[0]
    match = re.fullmatch(r"vit_(\w+)_patch(\d+)_(\d+)", name)
    if not match or match[1] not in _SIZES:
        raise UsageError(
            f"{fields.name}: architecture is {name!r}; this zoo reads timm's "
            f"vit_<size>_patch<pixels>_<pixels> of the sizes {', '.join(_SIZES)}"
        )
    fields.want("global_pool", "token")
    if fields.take("model_args", {}):
        raise UsageError(f"{fields.name}: model_args change the architecture {name!r}")
    num_classes = fields.take("num_classes", 1000)
    fields.ignore("num_features", "pretrained_cfg", "label_names", "label_descriptions")
    fields.ignore("do_pooling")
    fields.done()
    return _size(match[1], int(match[2]), int(match[3]), num_classes)


def table(config: ClassifierConfig) -> Table:
    """Keys of timm's checkpoints."""
    return tower_table(config.tower).under("tower") + head_table(config, head="head")


def tower_table(tower: ViTConfig) -> Table:
    """The same of the tower alone, which may have no class token."""
    rows = [
        Row("patch/kernel", "patch_embed.proj.weight", conv),
        Row("patch/bias", "patch_embed.proj.bias"),
        Row("position", "pos_embed", ones(1)),
        *[Row("cls", "cls_token", ones(2))] * tower.class_token,
        *norm_rows("final_norm", "norm"),
        *layer_rows(tower, "blocks.{}.", TIMM_LAYER),
    ]
    return Table(tuple(rows))


def _size(size: str, patch_size: int, image_size: int, num_classes: int) -> ClassifierConfig:
    return ClassifierConfig(
        _tower(image_size=image_size, patch_size=patch_size, **_SIZES[size]),
        num_classes=num_classes,
    )


def _tower(**sizes: int) -> ViTConfig:
    return ViTConfig(
        activation="gelu",
        norm_eps=1e-6,
        input_norm=False,
        position_resize="bicubic_antialias",
        **sizes,
    )


def _published() -> dict[str, ClassifierConfig]:
    """Every `vit_*.augreg*` of timm 1.0.31: ImageNet-1k in two resolutions, ImageNet-21k."""
    short = {"tiny": "ti", "small": "s", "base": "b", "large": "l"}
    resolutions = {
        ("base", 16): (224, 384),
        ("base", 32): (224, 384),
        ("base", 8): (224,),
        ("tiny", 16): (224, 384),
        ("small", 16): (224, 384),
        ("small", 32): (224, 384),
        ("large", 16): (224, 384),
    }
    variants = {}
    for (size, patch), sides in resolutions.items():
        name = f"vit_{short[size]}{patch}_augreg"
        variants |= {
            name if side == 224 else f"{name}.{side}": _size(size, patch, side, 1000)
            for side in sides
        }
        variants[f"{name}.in21k"] = _size(size, patch, 224, 21_843)
    return variants


VARIANTS = {
    **_published(),
    "timm_vit_tiny": ClassifierConfig(
        _tower(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=64),
        num_classes=5,
    ),
}

register_base(
    Base(
        slug="timm_vit",
        title="ViT as timm has it: augmentation and regularisation (augreg)",
        paper="arXiv:2106.10270",
        variants=VARIANTS,
        table=table,
        hf={"timm_wrapper": read},
        renames=((r"^timm_model\.", ""),),
    )
)
