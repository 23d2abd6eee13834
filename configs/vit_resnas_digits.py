"""A minute on a CPU: a vision transformer of three stages that learns to read single digits."""

from dataclasses import replace

from zoo.configs._classes import on_digits
from zoo.models.vision.vit_resnas import VARIANTS
from zoo.train.config import Experiment
from zoo.train.objectives.patches import PatchMix


def config() -> Experiment:
    """The experiment, with the classes of patches and with stochastic depth."""
    model = VARIANTS["vit_resnas_digits"]
    model = replace(model, tower=replace(model.tower, drop_path=0.1), patch_head=True)
    return on_digits("vit_resnas_digits", model, objective=PatchMix())
