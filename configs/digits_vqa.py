"""Questions about pictures of handwritten digits, by a model of three parts: nested queries, for
any number of vision tokens up to 16, of which deeper layers run fewer, and to which they add what
earlier layers of the tower have seen.
"""

from dataclasses import replace

from zoo.models.connectors.deepstack import DeepStack, Levels
from zoo.models.connectors.mqt import VARIANTS, training_budgets
from zoo.models.decoders.p_mod import PMoD
from zoo.train.config import Experiment, ProcessorConfig
from zoo.train.data.digits_vqa import Scene
from zoo.train.data.sources import DigitsVQA
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig
from zoo.train.parts import Part


def scene(side: int) -> Scene:
    """Pictures of this side in pixels on which small models learn to see in minutes."""
    return Scene(
        canvas=side,
        min_size=8,
        max_size=10,
        cells=4,
        noise=3.0,
        background=(0, 60),
        ink=(160, 255),
    )


def config() -> Experiment:
    """The experiment of `zoo quickstart`: minutes on two CPU cores."""
    model = VARIANTS["mqt_digits"]
    levels = Levels(layers=(1, 2), connector=model.connector)
    model = replace(model, policies=(PMoD(), DeepStack(groups=2, source=levels)))
    pictures = scene(model.tower.image_size)
    return Experiment(
        name="digits_vqa",
        model=model,
        data=DigitsVQA(pictures=10_000, validation_pictures=300, scene=pictures),
        steps=1_150,
        batch_size=64,
        # One program for all budgets: compiling eight would take longer than all the rest.
        objective=NextToken(training_budgets(model.connector.num_queries), masked=True),
        processor=ProcessorConfig(vocab_size=model.decoder.vocab_size),
        # Muon learns to see the digits in a fraction of the steps that AdamW takes.
        optim=OptimConfig(name="muon", lr=1.5e-2, b2=0.98, warmup=50, end=0.01),
        # Routers see unnormalised vectors: at that rate they would saturate and choose no more.
        parts=(Part(r".*/router/.*", lr=3e-4), Part(r"(?!.*/router/).*")),
        log_every=20,
        save_every=200,
        keep=2,
    )
