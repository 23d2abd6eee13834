"""Minutes on a CPU: one network of three stages whose sub-networks all learn to read digits."""

from zoo.configs._classes import on_digits
from zoo.models.vision.vit_resnas import VARIANTS
from zoo.train.config import Experiment
from zoo.train.objectives.patches import PatchMix
from zoo.train.objectives.subnets import SubNetworks


def config() -> Experiment:
    """The experiment: six sub-networks in every step."""
    return on_digits(
        "vit_resnas_supernet_digits",
        VARIANTS["vit_resnas_supernet_digits"],
        objective=SubNetworks(PatchMix(), examples=10, warmup=150),
        steps=600,
    )
