"""Minutes on a CPU: a ViR, which reads patches by retention, learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.vir import VirConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    tower = VirConfig(
        image_size=32,
        patch_size=4,
        width=64,
        depth=4,
        num_heads=4,
        mlp_dim=128,
        layer_scale=None,
        drop_path=0.1,
    )
    return on_digits("vir_digits", ClassifierConfig(tower, num_classes=10))
