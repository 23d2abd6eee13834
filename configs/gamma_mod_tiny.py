"""Two minutes on a CPU: a dense model in which γ-MoD lets half of the vision tokens skip layers."""

from dataclasses import replace

from zoo.configs._tiny import DENSE, two_stages
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.train.config import Recipe


def config() -> Recipe:
    """The recipe. Of six layers all but the first and the last let tokens skip."""
    policy = GammaMoD(layers=(1, 2, 3, 4), ratio=0.5, text_prefix=1, capacity=0.5)
    model = replace(DENSE, policies=(policy,))
    return two_stages("gamma_mod_tiny", model, fresh=(".*/router/kernel",))
