"""Minutes on a CPU: a ViT with a frozen layer, drawn and never trained, reads single digits."""

from dataclasses import replace

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.lm4visual import FROZEN, BorrowedConfig, LM4VisualConfig, vit
from zoo.train.config import Experiment
from zoo.train.parts import Part


def config() -> Experiment:
    """The experiment: the borrowed layer stays as it is, all else trains."""
    tower = LM4VisualConfig(
        vit(image_size=32, patch_size=4, width=64, depth=3, num_heads=4, mlp_dim=128),
        BorrowedConfig(96, 4, 192, first_layer=1, num_layers=2),
    )
    found = on_digits("lm4visual_digits", ClassifierConfig(tower, num_classes=10))
    frozen = "|".join(FROZEN)
    return replace(found, parts=(Part(frozen, frozen=True), Part(f"(?!{frozen}).*")))
