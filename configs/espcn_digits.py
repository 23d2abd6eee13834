"""A minute on a CPU: an ESPCN doubles the resolution of scans of digits, from 4 x 4 pixels."""

from dataclasses import replace

from zoo.configs._classes import on_digits
from zoo.models.generators.espcn import ESPCNConfig
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.dense import DigitsRestore
from zoo.train.objectives.restore import Restore
from zoo.train.optim import OptimConfig


def config() -> Experiment:
    """The experiment: luma in [0, 1], the network for a factor of 2."""
    found = on_digits(
        "espcn_digits",
        ESPCNConfig(factor=2, image_size=4),
        data=DigitsRestore(),
        objective=Restore(),
        optim=OptimConfig(lr=2e-3, warmup=30),
        steps=1500,
    )
    return replace(found, processor=ProcessorConfig(mean=(0.0,) * 3, std=(1.0,) * 3))
