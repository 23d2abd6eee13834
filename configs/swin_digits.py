"""A minute on a CPU: a Swin of two stages that learns to read single digits."""

from dataclasses import replace

from zoo.configs._classes import on_digits
from zoo.models.vision.swin import VARIANTS
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment, with stochastic depth."""
    model = VARIANTS["swin_digits"]
    return on_digits("swin_digits", replace(model, tower=replace(model.tower, drop_path=0.1)))
