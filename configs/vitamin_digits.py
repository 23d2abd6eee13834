"""Minutes on a CPU: a ViTamin that learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.vitamin import ViTaminConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    tower = ViTaminConfig(
        image_size=64,
        stem_width=16,
        stage_widths=(16, 32),
        stage_depths=(1, 1),
        width=64,
        depth=3,
        num_heads=4,
        mlp_dim=128,
        drop_path=0.1,
    )
    model = ClassifierConfig(tower, "mean", num_classes=10, head_norm="layer")
    return on_digits("vitamin_digits", model)
