"""Two minutes on a CPU: a model is trained, then prefers right answers to wrong ones (DPO)."""

from zoo.configs._tiny import DENSE, two_stages
from zoo.configs.digits_vqa import scene
from zoo.train.config import Recipe
from zoo.train.data.preferences import WrongAnswers
from zoo.train.data.sources import DigitsVQA
from zoo.train.lora import LoRA
from zoo.train.objectives.preference import Preference
from zoo.train.optim import OptimConfig


def config() -> Recipe:
    """The recipe. Through adapters: the model without them is what it is compared with."""
    pictures = scene(DENSE.tower.image_size)
    right = DigitsVQA(pictures=1_000, validation_pictures=50, scene=pictures)
    return two_stages(
        "prefer_tiny",
        DENSE,
        objective=Preference(beta=0.1),
        data=WrongAnswers(right),
        parts=(),
        lora=LoRA(rank=8, alpha=16.0),
        optim=OptimConfig(lr=1e-3, warmup=20, end=0.1),
    )
