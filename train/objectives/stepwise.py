"""Objectives around another one, for which batches change as training goes on."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import Carried, Means, Objective, Variables, Variant


class Stepwise(Objective):
    """Another objective, whose batches are changed in training by the number of the step.

    It counts the batches that it is given; steps that are left out do not count. Evaluation is that
    of the other objective, of batches as they are. A subclass is a dataclass.

    Attributes:
      objective: what the model is trained to do.
      counter: what is carried is called so.
    """

    objective: Objective

    counter: ClassVar[str]
    fixed: ClassVar[tuple[str, ...]] = ("teacher",)
    whole_batch: ClassVar[bool] = True  # parts of a batch would be counted as batches

    def changed(self, model: nn.Module, batch: Batch, step: Array, key: Array) -> Batch:
        """The batch of a step, from 0; `key` is for what is drawn."""
        raise NotImplementedError

    def variant(self, seed: int, step: int) -> Variant:
        """That of the other objective."""
        return self.objective.variant(seed, step)

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """Those of the other objective."""
        return self.objective.targets(model, inputs)

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """What the other objective carries, and the number of steps so far."""
        return {**self.objective.init(model, variables, inputs), self.counter: jnp.int32(0)}

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
        """Of the other objective. Arguments are those of `Objective.loss`."""
        if not train:
            return self.objective.loss(model, variables, aux, batch, key, variant, train=False)
        drawn, own = jax.random.split(key)
        step = aux[self.counter]
        batch = self.changed(model, batch, step, drawn)
        terms, others, carried = self.objective.loss(model, variables, aux, batch, own, variant)
        counted = {**carried.get("aux", {}), self.counter: step + 1}
        return terms, others, {**carried, "aux": counted}
