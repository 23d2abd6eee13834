"""Minutes on a CPU: a masked autoencoder that completes real scans of digits."""

from dataclasses import replace

from zoo.configs._classes import on_digits
from zoo.train.config import Experiment
from zoo.train.objectives.masked import MaskedPixels
from zoo.train.recipes.mae_human_scaling import PRETRAIN, VARIANTS


def config() -> Experiment:
    """The experiment: the published optimizer, with a larger step and a warmup."""
    return on_digits(
        "mae_digits",
        VARIANTS["mae_human_scaling_digits"],
        objective=MaskedPixels(),
        optim=replace(PRETRAIN, lr=1e-3, warmup=30),
        steps=600,
    )
