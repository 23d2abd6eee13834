"""Two minutes on a CPU: a model of six layers is trained, and one of two learns what it would say.

The teacher is the first stage of the run in `runs/distill_tiny`, where `zoo train distill_tiny`
leaves it; with another `--out`, name it by `--stages.1.objective.teacher`.
"""

from dataclasses import replace

from zoo.configs._tiny import DENSE, two_stages
from zoo.train.config import Recipe
from zoo.train.objectives.distill import Distill


def config() -> Recipe:
    """The recipe. The smaller model begins with the eyes of the larger one, and a new decoder."""
    return two_stages(
        "distill_tiny",
        replace(DENSE, decoder=replace(DENSE.decoder, depth=2)),
        fresh=("decoder/.*",),
        objective=Distill("runs/distill_tiny/1_dense", temperature=2.0, labels=0.5),
    )
