"""Minutes on a CPU: a CrossViT that learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.vision.crossvit import CrossViTClassifierConfig, CrossViTConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment: patches of 4 and of 8 pixels."""
    tower = CrossViTConfig(
        image_sizes=(32, 32),
        patch_sizes=(4, 8),
        widths=(32, 64),
        depths=((1, 2),) * 2,
        num_heads=(2, 4),
        mlp_ratios=(2, 2),
        drop_path=0.1,
    )
    return on_digits("crossvit_digits", CrossViTClassifierConfig(tower, num_classes=10))
