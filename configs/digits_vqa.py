"""Questions about pictures of handwritten digits, for any number of vision tokens up to 16."""

from zoo.models.connectors.mqt import VARIANTS, training_budgets
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.sources import DigitsVQA
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig


def config() -> Experiment:
    """The experiment of `zoo quickstart`: minutes on two CPU cores."""
    model = VARIANTS["mqt_digits"]
    return Experiment(
        name="digits_vqa",
        model=model,
        data=DigitsVQA(pictures=12_000, validation_pictures=300),
        steps=1_000,
        batch_size=32,
        # One program for all budgets: compiling eight would take longer than all the rest.
        objective=NextToken(training_budgets(model.connector.num_queries), masked=True),
        processor=ProcessorConfig(vocab_size=model.decoder.vocab_size),
        optim=OptimConfig(lr=3e-3, warmup=100),
        log_every=20,
        save_every=200,
        keep=2,
    )
