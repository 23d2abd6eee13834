"""Swin Transformer: image classification with attention inside shifted windows.

The tower is `zoo.models.parts.towers.swin`; its `Features.pyramid` is what dense heads take.
Checkpoints in the layout of the Hugging Face hub are read by `zoo.models.base.hub_swin`.

Follows: arXiv:2103.14030.
"""

import dataclasses

from zoo.models.core.card import Card
from zoo.models.core.keytable import Table
from zoo.models.core.registry import register
from zoo.models.core.types import Array
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.layers.window import resize_bias
from zoo.models.parts.towers.swin import SwinConfig, swin_table

CARD = Card(
    slug="swin",
    paper="arXiv:2103.14030",
    code="https://github.com/microsoft/Swin-Transformer",
    differs=(
        "Images of any size are taken: grids are filled up to whole windows, as timm does; the "
        "official classifier takes one size only.",
        "Masks and relative positions are made of the sizes and are no part of checkpoints.",
    ),
)

# Stochastic depth of the published training, as `drop_path`: T 0.2, S 0.3, B 0.5, L 0.2.
_SIZES = {
    "t": {"first_width": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "s": {"first_width": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "b": {"first_width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "l": {"first_width": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


def _size(size: str, *, image_size: int = 224, window: int = 7) -> ClassifierConfig:
    tower = SwinConfig(image_size=image_size, window=window, **_SIZES[size])
    return ClassifierConfig(tower, "mean", num_classes=1000)


VARIANTS = {
    "swin_t": _size("t"),
    "swin_s": _size("s"),
    "swin_b": _size("b"),
    "swin_b.384": _size("b", image_size=384, window=12),
    "swin_l": _size("l"),
    "swin_l.384": _size("l", image_size=384, window=12),
    # Ours, for the packaged digit scans enlarged to 32 x 32 pixels.
    "swin_digits": ClassifierConfig(
        SwinConfig(
            image_size=32,
            patch_size=4,
            first_width=32,
            depths=(2, 2),
            num_heads=(2, 4),
            window=4,
            mlp_ratio=2.0,
        ),
        "mean",
        num_classes=10,
    ),
    "swin_tiny": ClassifierConfig(
        SwinConfig(
            image_size=16,
            patch_size=2,
            first_width=8,
            depths=(2, 1),
            num_heads=(2, 4),
            window=4,
            mlp_ratio=2.0,
        ),
        "mean",
        num_classes=5,
    ),
}


def table(config: ClassifierConfig) -> Table:
    """Keys of the official files, whose tensors are below `model`."""
    return swin_table(config.tower).under("tower") + head_table(config, head="head")


def timm_table(config: ClassifierConfig) -> Table:
    """Keys of timm's files."""
    tower = swin_table(config.tower, merge_from=1).under("tower")
    return tower + head_table(config, head="head.fc")


def for_images(
    config: ClassifierConfig, params: dict[str, Array], *, image_size: int, window: int
) -> tuple[ClassifierConfig, dict[str, Array]]:
    """A model for images of another size with other windows, as fine-tuning at 384 pixels begins.

    Args:
      config: of the model that is there.
      params: its parameters, not boxed.
      image_size: side of the new images in pixels.
      window: side of the new windows.

    Returns:
      the new configuration, and parameters whose tables of relative positions are interpolated.
    """
    tower = dataclasses.replace(config.tower, image_size=image_size, window=window)
    stages = dict(params["tower"])
    for stage, (old, new) in enumerate(zip(config.tower.sides, tower.sides, strict=True)):
        layers = stages[f"stages_{stage}"]["layers"]
        before, after = min(old, config.tower.window), min(new, window)
        resized = resize_bias(layers["relative_bias"]["table"], (before,) * 2, (after,) * 2)
        layers = {**layers, "relative_bias": {"table": resized}}
        stages[f"stages_{stage}"] = {"layers": layers}
    return dataclasses.replace(config, tower=tower), {**params, "tower": stages}


register(CARD, VARIANTS, table=table)
