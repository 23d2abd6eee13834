"""Two minutes on a CPU: nested embeddings of real scans of digits."""

from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.classes import DigitsClassify
from zoo.train.objectives.nested import NestedCrossEntropy
from zoo.train.optim import OptimConfig
from zoo.train.recipes.mrl import VARIANTS


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="mrl_digits",
        model=VARIANTS["mrl_digits"],
        data=DigitsClassify(),
        steps=600,
        batch_size=64,
        objective=NestedCrossEntropy(),
        processor=ProcessorConfig(fit="squash"),
        optim=OptimConfig(lr=2e-3, warmup=30),
        log_every=20,
        eval_every=100,
        eval_examples=360,
        save_every=200,
        keep=1,
    )
