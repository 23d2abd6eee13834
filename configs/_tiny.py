"""What the tiny recipes share: a model that is trained dense, and then as something else."""

from dataclasses import replace
from typing import Any

from zoo.configs.digits_vqa import scene
from zoo.models.connectors.mqt import VARIANTS
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.train.config import Experiment, ProcessorConfig, Recipe
from zoo.train.data.sources import DigitsVQA
from zoo.train.objectives import NextToken, Objective
from zoo.train.optim import OptimConfig
from zoo.train.parts import Part

_QUICK = VARIANTS["mqt_digits"]

DENSE = replace(
    _QUICK,
    connector=MLPConnector(),
    decoder=replace(_QUICK.decoder, depth=6, mlp_dim=96),
)
"""LLaVA for pictures of 40 x 40 pixels: all of its 16 vision tokens go through all six layers."""


def two_stages(
    name: str,
    model: LlavaConfig,
    *,
    fresh: tuple[str, ...] = (),
    objective: Objective = NextToken(),  # noqa: B008 (frozen)
    **others: Any,
) -> Recipe:
    """Two minutes on a CPU.

    Args:
      name: of the recipe.
      model: what the dense model becomes in the second stage, in which the tower is frozen.
      fresh: patterns of the parameters that the dense model does not have.
      objective: of the second stage.
      **others: what else it has that the first one does not.
    """
    pictures = scene(DENSE.tower.image_size)
    dense = Experiment(
        name="dense",
        model=DENSE,
        data=DigitsVQA(pictures=1_000, validation_pictures=50, scene=pictures),
        steps=200,
        batch_size=32,
        processor=ProcessorConfig(vocab_size=DENSE.decoder.vocab_size),
        optim=OptimConfig(name="muon", lr=1.5e-2, b2=0.98, warmup=20, end=0.1),
        eval_examples=50,
        save_every=100,
        keep=1,
    )
    changes: dict[str, Any] = {
        "name": "instruct",
        "parts": (Part("tower/.*", frozen=True), Part("(connector|decoder)/.*")),
        "optim": replace(dense.optim, lr=5e-3),
        **others,
    }
    instruct = replace(dense, model=model, fresh=fresh, steps=100, objective=objective, **changes)
    return Recipe(name, (dense, instruct))
