"""What the recipes of vision models on the packaged digit scans share."""

from zoo.models.core.config import ModelConfig
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.classes import DigitsClassify
from zoo.train.data.sources import DataConfig
from zoo.train.objectives import Objective
from zoo.train.objectives.classify import Classify
from zoo.train.optim import OptimConfig

VALIDATION = 360
"""Scans, or pictures made of them, of the validation split."""


def on_digits(
    name: str,
    model: ModelConfig,
    *,
    data: DataConfig = DigitsClassify(),  # noqa: B008 (frozen)
    objective: Objective = Classify(smoothing=0.1),  # noqa: B008 (frozen)
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup=30, weight_decay=0.05),  # noqa: B008
    steps: int = 300,
    batch_size: int = 60,
) -> Experiment:
    """Minutes on a CPU: a model that learns from the scans, enlarged to what it takes. There are
    1,437.

    Args:
      name: of the experiment.
      model: takes square images; a classifier has ten classes.
      data: what is made of the scans, with 360 records for validation; classes by default.
      objective: what it is trained to do.
      optim: how parameters move.
      steps: how many.
      batch_size: records per step; a divisor of 360, so that evaluation sees each once.
    """
    return Experiment(
        name=name,
        model=model,
        data=data,
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
