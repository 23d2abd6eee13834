"""A help that a model has in the beginning of its training, and that fades."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import Objective
from zoo.train.objectives.classify import Classify
from zoo.train.objectives.stepwise import Stepwise

Form = Literal["constant", "linear"]
"""How a share fades: it is 1 until it is 0, or falls in every step."""


def share_left(step: Array | int, steps: int, form: Form = "constant") -> Array:
    """The share of a help at a training step, float32 []: 0 from `steps` on.

    Args:
      step: from 0.
      steps: how long there is some.
      form: 1 until then, or from 1 down to 0 at the last of these steps.
    """
    slope = 1 / max(steps - 1, 1) if form == "linear" else 0.0
    return jnp.where(jnp.asarray(step) < steps, 1 - slope * jnp.asarray(step, jnp.float32), 0.0)


@dataclass(frozen=True)
class Fading(Stepwise):
    """Another objective, whose batches say in training how much of a help is left.

    Evaluation is without help. Follows: arXiv:2404.06773.

    Attributes:
      entry: what a batch calls the share, float32 []; the model reads it.
      steps: how long there is some.
      form: how it fades.
      objective: what the model is trained to do.
    """

    entry: str
    steps: int
    form: Form = "constant"
    objective: Objective = field(default_factory=Classify)

    counter: ClassVar[str] = "fading_step"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"objective.steps is {self.steps}: want 1 or more")
        if self.form not in get_args(Form):
            known = " or ".join(get_args(Form))
            raise UsageError(f"objective.form is {self.form!r}: want {known}")

    def changed(self, model: nn.Module, batch: Batch, step: Array, key: Array) -> Batch:
        """The batch with the share."""
        return {**batch, self.entry: share_left(step, self.steps, self.form)}
