"""A few seconds on one CPU core: the digits experiment, too small to learn much."""

import dataclasses

from zoo.models.connectors.mqt import VARIANTS, training_budgets
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.sources import DigitsVQA
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig


def config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(VARIANTS["mqt_tiny"], text_tokens=96)
    return Experiment(
        name="digits_vqa_tiny",
        model=model,
        data=DigitsVQA(pictures=64, validation_pictures=16),
        steps=12,
        batch_size=8,
        objective=NextToken(budgets=training_budgets(model.connector.num_queries)),
        processor=ProcessorConfig(vocab_size=model.decoder.vocab_size),
        optim=OptimConfig(lr=3e-3, warmup=2),
        log_every=1,
        eval_every=6,
        eval_examples=16,
        save_every=4,
        keep=2,
    )
