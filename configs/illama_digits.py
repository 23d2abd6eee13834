"""Minutes on a CPU: an iLLaMA that learns to read single digits, causal from the first step."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.illama import ILlamaConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    tower = ILlamaConfig(
        image_size=32, patch_size=4, width=64, depth=4, num_heads=4, mlp_dim=128, drop_path=0.1
    )
    return on_digits("illama_digits", ClassifierConfig(tower, num_classes=10))
