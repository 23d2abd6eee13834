"""Minutes on a CPU: an iLLaMA that learns to read single digits, and to attend backwards alone.

Its mask is soft in the first third of the training and turns causal step by step, as that of the
published base size does in the first 25 of 300 epochs.
"""

from zoo.configs._classes import on_digits
from zoo.models.vision.illama import SOFT_MASK, ILlamaClassifierConfig, ILlamaConfig
from zoo.train.config import Experiment
from zoo.train.objectives.classify import Classify
from zoo.train.objectives.fading import Fading


def config() -> Experiment:
    """The experiment."""
    tower = ILlamaConfig(
        image_size=32, patch_size=4, width=64, depth=4, num_heads=4, mlp_dim=128, drop_path=0.1
    )
    return on_digits(
        "illama_digits",
        ILlamaClassifierConfig(tower, num_classes=10),
        objective=Fading(SOFT_MASK, 100, "linear", Classify(smoothing=0.1)),
    )
