"""A help that a model has in the beginning of its training, and that fades."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import Carried, Means, Objective, Variables, Variant
from zoo.train.objectives.classify import Classify

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
class Fading(Objective):
    """Another objective, whose batches say in training how much of a help is left.

    It counts the batches that it is given; steps that are left out do not count. Evaluation is
    without help. Follows: arXiv:2404.06773.

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

    fixed: ClassVar[tuple[str, ...]] = ("teacher",)
    whole_batch: ClassVar[bool] = True  # parts of a batch would be counted as batches

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"objective.steps is {self.steps}: want 1 or more")
        if self.form not in get_args(Form):
            known = " or ".join(get_args(Form))
            raise UsageError(f"objective.form is {self.form!r}: want {known}")

    def variant(self, seed: int, step: int) -> Variant:
        """That of the other objective."""
        return self.objective.variant(seed, step)

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """Those of the other objective."""
        return self.objective.targets(model, inputs)

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """What the other objective carries, and the number of steps so far."""
        return {**self.objective.init(model, variables, inputs), "fading_step": jnp.int32(0)}

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """What the other objective loads."""
        return self.objective.load(mesh)

    def loss(
        self,
        model: nn.Module,
        variables: Variables,
        aux: Mapping[str, Any],
        batch: Batch,
        key: Array,
        variant: Variant,
        *,
        train: bool = True,
    ) -> tuple[Means, Means, Carried]:
        """Of the other objective, with the share in its batch. Arguments are those of
        `Objective.loss`.
        """
        if not train:
            return self.objective.loss(model, variables, aux, batch, key, variant, train=False)
        step = aux["fading_step"]
        batch = {**batch, self.entry: share_left(step, self.steps, self.form)}
        terms, others, carried = self.objective.loss(model, variables, aux, batch, key, variant)
        counted = {**carried.get("aux", {}), "fading_step": step + 1}
        return terms, others, {**carried, "aux": counted}
