"""Two minutes on a CPU: a dense model that then sees crops of every picture too, by DeepStack."""

from dataclasses import replace

from zoo.configs._tiny import DENSE, two_stages
from zoo.models.connectors.deepstack import DeepStack
from zoo.train.config import Recipe


def config() -> Recipe:
    """The recipe. DeepStack has no parameters of its own."""
    return two_stages("deepstack_tiny", replace(DENSE, policies=(DeepStack(),)))
