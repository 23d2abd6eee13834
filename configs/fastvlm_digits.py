"""Minutes on a CPU: FastVLM's kind of encoder, with its branches, learns to read single digits."""

from zoo.configs._classes import on_digits
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.fastvit import FastViTConfig
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment."""
    tower = FastViTConfig(
        image_size=48,
        depths=(1, 1, 1),
        widths=(16, 32, 64),
        mlp_ratios=(2, 2, 2),
        attention_from=2,
        form="branches",
        layer_scale=0.1,
    )
    return on_digits("fastvlm_digits", ClassifierConfig(tower, "mean", num_classes=10))
