"""What the recipes of image classifiers on the packaged digit scans share."""

from zoo.models.core.config import ModelConfig
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.classes import DigitsClassify
from zoo.train.objectives import Objective
from zoo.train.objectives.classify import Classify
from zoo.train.optim import OptimConfig

VALIDATION = 360
"""Scans of the validation split."""


def on_digits(
    name: str,
    model: ModelConfig,
    *,
    objective: Objective = Classify(smoothing=0.1),  # noqa: B008 (frozen)
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=30, weight_decay=0.05),  # noqa: B008
    steps: int = 300,
    batch_size: int = 60,
) -> Experiment:
    """A minute on a CPU: a classifier of the scans, enlarged to what it takes. There are 1,437.

    Args:
      name: of the experiment.
      model: takes square images, has ten classes.
      objective: what it is trained to do.
      optim: how parameters move.
      steps: how many.
      batch_size: scans per step; a divisor of 360, so that evaluation sees each scan once.
    """
    return Experiment(
        name=name,
        model=model,
        data=DigitsClassify(),
        steps=steps,
        batch_size=batch_size,
        objective=objective,
        processor=ProcessorConfig(resize="bilinear"),
        optim=optim,
        eval_every=steps // 3,
        eval_examples=VALIDATION,
        save_every=steps,
        keep=1,
    )
