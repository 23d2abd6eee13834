"""Many networks in the weights of one, all trained in the same step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import Carried, Means, Objective, Variables, Variant
from zoo.train.objectives.classify import Classify


@dataclass(frozen=True)
class SubNetworks(Objective):
    """Another objective, for which every example goes through a sub-network of the model.

    A batch is divided among several sub-networks, drawn anew in every step; the smaller ones come
    into use little by little. Evaluation is that of the whole network. Follows: arXiv:2109.00642.

    Attributes:
      objective: what the sub-networks are trained to do.
      examples: of a batch that go through the same one.
      warmup: steps until the smallest are in use.
    """

    objective: Objective = field(default_factory=Classify)
    examples: int = 64
    warmup: int = 0

    fixed: ClassVar[tuple[str, ...]] = ("teacher",)
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.examples < 1 or self.warmup < 0:
            raise UsageError(
                f"objective.examples is {self.examples}, objective.warmup {self.warmup}: want 1 or "
                "more, and 0 or more"
            )

    def variant(self, seed: int, step: int) -> Variant:
        """That of the other objective."""
        return self.objective.variant(seed, step)

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """Those of the other objective."""
        return self.objective.targets(model, inputs)

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """What the other objective carries, and the number of steps so far."""
        return {**self.objective.init(model, variables, inputs), "subnets_step": jnp.int32(0)}

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
        """Of the other objective, whose batch says what is `kept` for each example.

        Args:
          model: its configuration has `draw_kept(key, batch_size, examples, step, warmup)`, and it
            reads what this returns as `kept` of a batch.
          variables: as of `Objective.loss`.
          aux: likewise.
          batch: `pixels` [B, H, W, C], and what the other objective reads.
          key: what the draws come from.
          variant: as of `Objective.loss`.
          train: likewise.
        """
        if not train:
            return self.objective.loss(model, variables, aux, batch, key, variant, train=False)
        drawn, own = jax.random.split(key)
        step, size = aux["subnets_step"], len(batch["pixels"])
        kept = model.config.draw_kept(drawn, size, self.examples, step, self.warmup)
        batch = {**batch, "kept": kept}
        terms, others, carried = self.objective.loss(model, variables, aux, batch, own, variant)
        counted = {**carried.get("aux", {}), "subnets_step": step + 1}
        return terms, others, {**carried, "aux": counted}
