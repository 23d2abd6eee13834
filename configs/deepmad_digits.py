"""Minutes on a CPU: a small DeepMAD network that learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.deepmad import DeepMADConfig
from zoo.models.vision.deepmad.score import Unit
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    units = (
        Unit("conv", 16, 3, 2),
        Unit("bottleneck", 32, 3, 2, 1, 16),
        Unit("bottleneck", 64, 3, 1, 2, 16),
        Unit("inverted", 64, 3, 2, 2, 128),
    )
    model = ClassifierConfig(DeepMADConfig(32, units), "mean", num_classes=10)
    return on_digits("deepmad_digits", model)
