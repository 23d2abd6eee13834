"""A small scale-aware modulation transformer that learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.smt import SMTConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    tower = SMTConfig(
        image_size=32,
        widths=(16, 32, 48, 64),
        depths=(1, 1, 2, 1),
        num_heads=(2, 4),
        mlp_ratios=(2, 2, 2, 2),
        drop_path=0.1,
    )
    return on_digits("smt_digits", ClassifierConfig(tower, "mean", num_classes=10))
