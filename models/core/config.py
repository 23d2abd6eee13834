"""The typed configuration of a model, which knows its module and its inputs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.models.core.types import Batch


@dataclass(frozen=True)
class ModelConfig:
    """Base of every configuration that `zoo.create` builds a model from.

    Frozen, hashable, of plain values.
    """

    def build(self) -> "nn.Module":
        """The Flax module of this configuration."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def inputs(self, batch_size: int) -> "Batch":
        """A batch of `jax.ShapeDtypeStruct`: the shapes for tests, cost and planning."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it takes")
