"""Minutes on a CPU: a T2T-ViT that learns to read single digits."""

from dataclasses import replace

from zoo.configs._classes import on_digits
from zoo.models.vision.t2t_vit import VARIANTS
from zoo.train.config import Experiment


def config() -> Experiment:
    """The experiment, with stochastic depth."""
    model = VARIANTS["t2t_vit_digits"]
    return on_digits("t2t_vit_digits", replace(model, tower=replace(model.tower, drop_path=0.1)))
