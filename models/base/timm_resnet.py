"""The ResNets of timm with bottlenecks, in its layout, which is torchvision's too.

Follows: arXiv:1512.03385. `timm_resnet50` here is timm's `resnet50` with any of its weights
(`.a1_in1k`, `.tv2_in1k`, ...); they bring the running statistics of the batch norms with them.
"""

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.towers.resnet import EXPANSION, ResNetConfig, resnet_table

_CHANNELS = (64, 128, 256, 512)
_DEPTHS = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def read(fields: Fields) -> ClassifierConfig:
    """The configuration that timm's `config.json` describes: a name, the number of classes, and
    perhaps other depths (`layers`) and widths (`channels`).

    Raises:
      UsageError: the name is not one of those that are here.
    """
    name = fields.take("architecture").partition(".")[0]
    if name not in _DEPTHS:
        raise UsageError(
            f"{fields.name}: architecture is {name!r}; of timm's ResNets this zoo reads "
            f"{', '.join(_DEPTHS)}"
        )
    fields.want("global_pool", "avg")
    changes = dict(fields.take("model_args", {}))
    depths = changes.pop("layers", _DEPTHS[name])
    channels = changes.pop("channels", _CHANNELS)
    if changes:
        raise UsageError(
            f"{fields.name}: model_args change {', '.join(sorted(changes))} of {name!r}; this zoo "
            "reads layers and channels"
        )
    num_classes = fields.take("num_classes", 1000)
    fields.ignore("num_features", "pretrained_cfg", "label_names", "label_descriptions")
    fields.ignore("do_pooling")
    fields.done()
    return _size(tuple(depths), tuple(channels), num_classes)


def table(config: ClassifierConfig) -> Table:
    """Keys of timm's checkpoints; running statistics stand below `stats/`."""
    return resnet_table(config.tower).under("tower") + head_table(config, head="fc")


def _size(
    depths: tuple[int, ...], channels: tuple[int, ...] = _CHANNELS, num_classes: int = 1000
) -> ClassifierConfig:
    """`channels` are those of the 3 x 3 convolutions of each stage."""
    widths = tuple(EXPANSION * number for number in channels)
    return ClassifierConfig(ResNetConfig(224, depths, widths), "mean", num_classes=num_classes)


VARIANTS = {
    **{f"timm_{name}": _size(depths) for name, depths in _DEPTHS.items()},
    "timm_resnet_tiny": ClassifierConfig(
        ResNetConfig(32, (2, 1), (16, 32), stem_width=8), "mean", num_classes=5
    ),
}

register_base(
    Base(
        slug="timm_resnet",
        title="ResNet as timm has it",
        paper="arXiv:1512.03385",
        variants=VARIANTS,
        table=table,
        hf={"timm_resnet": read},
        renames=((r"^timm_model\.", ""),),
    )
)
