"""Many networks in the weights of one, all trained in the same step."""

from dataclasses import dataclass, field
from typing import ClassVar

import flax.linen as nn

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import Objective
from zoo.train.objectives.classify import Classify
from zoo.train.objectives.stepwise import Stepwise


@dataclass(frozen=True)
class SubNetworks(Stepwise):
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

    counter: ClassVar[str] = "subnets_step"

    def __post_init__(self) -> None:
        if self.examples < 1 or self.warmup < 0:
            raise UsageError(
                f"objective.examples is {self.examples}, objective.warmup {self.warmup}: want 1 or "
                "more, and 0 or more"
            )

    def changed(self, model: nn.Module, batch: Batch, step: Array, key: Array) -> Batch:
        """The batch, which says what is `kept` for each example.

        The configuration of the model has `draw_kept(key, batch_size, examples, step, warmup)`, and
        the model reads what this returns.
        """
        size = len(batch["pixels"])
        kept = model.config.draw_kept(key, size, self.examples, step, self.warmup)
        return {**batch, "kept": kept}
