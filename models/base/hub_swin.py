"""Swin in the layout of Hugging Face. Follows: arXiv:2103.14030.

The same models in the layouts of the official files and of timm are in `zoo.models.vision.swin`.
"""

from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table, read_classes
from zoo.models.parts.towers.hub import read_side
from zoo.models.parts.towers.swin import TRANSFORMERS, SwinConfig, swin_table


def read(fields: Fields) -> ClassifierConfig:
    """The configuration that a `config.json` of Swin describes: an encoder, or a classifier."""
    fields.want("num_channels", 3)
    fields.want("qkv_bias", True)
    fields.want("hidden_act", "gelu")
    fields.want("use_absolute_embeddings", False)
    tower = SwinConfig(
        image_size=read_side(fields, "image_size", 224),
        patch_size=read_side(fields, "patch_size", 4),
        first_width=fields.take("embed_dim", 96),
        depths=fields.take("depths", (2, 2, 6, 2)),
        num_heads=fields.take("num_heads", (3, 6, 12, 24)),
        window=fields.take("window_size", 7),
        mlp_ratio=float(fields.take("mlp_ratio", 4.0)),
        norm_eps=fields.take("layer_norm_eps", 1e-5),
        pad_first=True,
    )
    # Of training and masked image modelling; what follows from the sizes; of backbones.
    fields.ignore("drop_path_rate", "encoder_stride", "path_norm", "hidden_size", "num_layers")
    fields.ignore("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")
    num_classes = read_classes(fields)
    fields.done()
    return ClassifierConfig(tower, "mean", num_classes=num_classes)


def table(config: ClassifierConfig) -> Table:
    """Keys of the hub's checkpoints."""
    tower = swin_table(
        config.tower,
        patch=("embeddings.patch_embeddings.projection", "embeddings.norm"),
        layer="encoder.layers.{stage}.blocks.{{}}.",
        names=TRANSFORMERS,
        merge="encoder.layers.{stage}.downsample.",
        final="layernorm",
    )
    tower = tower.under("tower", "swin." if config.num_classes else "")
    return tower + head_table(config, head="classifier")


def _size(
    first_width: int, depth: int, first_heads: int, image_size: int = 224, window: int = 7
) -> ClassifierConfig:
    """A published size, with the 1,000 classes of ImageNet."""
    tower = SwinConfig(
        image_size=image_size,
        first_width=first_width,
        depths=(2, 2, depth, 2),
        num_heads=tuple(first_heads * 2**stage for stage in range(4)),
        window=window,
        pad_first=True,
    )
    return ClassifierConfig(tower, "mean", num_classes=1000)


# Sizes: config.json of microsoft/swin-*.
VARIANTS = {
    "hub_swin_t": _size(96, 6, 3),
    "hub_swin_s": _size(96, 18, 3),
    "hub_swin_b": _size(128, 18, 4),
    "hub_swin_b.384": _size(128, 18, 4, 384, 12),
    "hub_swin_l": _size(192, 18, 6),
    "hub_swin_l.384": _size(192, 18, 6, 384, 12),
    "hub_swin_tiny": ClassifierConfig(
        SwinConfig(
            image_size=16,
            patch_size=2,
            first_width=8,
            depths=(2, 1),
            num_heads=(2, 4),
            window=4,
            mlp_ratio=2.0,
            pad_first=True,
        ),
        "mean",
        num_classes=5,
    ),
}

register_base(
    Base(
        slug="hub_swin",
        title="Swin, as the Hugging Face hub has it",
        paper="arXiv:2103.14030",
        variants=VARIANTS,
        table=table,
        hf={"swin": read},
    )
)
