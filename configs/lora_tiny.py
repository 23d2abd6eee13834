"""Two minutes on a CPU: a model is trained whole, and then through low-rank adapters alone."""

from zoo.configs._tiny import DENSE, two_stages
from zoo.train.config import Recipe
from zoo.train.lora import LoRA
from zoo.train.optim import OptimConfig


def config() -> Recipe:
    """The recipe. What the first stage has learned stays as it is."""
    return two_stages(
        "lora_tiny",
        DENSE,
        parts=(),
        lora=LoRA(rank=8, alpha=16.0),
        optim=OptimConfig(lr=3e-3, warmup=20, end=0.1),
    )
