"""Minutes on a CPU: a small RegNet, scaled to four times its FLOPs, that learns to read digits."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.regnet import RegNetConfig
from zoo.train.config import Experiment
from zoo.train.recipes.fast_scaling import FastScaling

SMALL = RegNetConfig(
    image_size=32, depths=(1, 2), widths=(16, 32), group_widths=(8, 8), stem_width=16
)
SCALE = 4.0


def config() -> Experiment:
    """The experiment."""
    model = FastScaling()(ClassifierConfig(SMALL, "mean", num_classes=10), SCALE)
    return on_digits("fast_scaling_digits", model)
