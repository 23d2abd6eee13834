"""Two minutes on a CPU: a dense model that becomes p-MoD, whose layers run ever fewer tokens."""

from dataclasses import replace

from zoo.configs._tiny import DENSE, two_stages
from zoo.models.decoders.p_mod import PMoD
from zoo.train.config import Recipe


def config() -> Recipe:
    """The recipe."""
    model = replace(DENSE, policies=(PMoD(),))
    return two_stages("p_mod_tiny", model, fresh=("decoder/stack/layers/router/.*",))
