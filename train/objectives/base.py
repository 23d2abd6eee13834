"""The contract between an objective and the loop."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import struct

from zoo.models.core.types import Batch

Variant = Hashable
"""What the host chooses anew for each step, static in the compiled step: one program per value."""


@struct.dataclass
class Mean:
    """A mean over `weight` things whose sum is `total`, both float32 scalars.

    Means of parts of a batch add up to the mean of the whole, in evaluation as for gradients.
    """

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """The mean; 0 of nothing."""
        return self.total / jax.numpy.maximum(self.weight, 1)


Means = Mapping[str, Mean]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives."""

    def variant(self, seed: int, step: int) -> Variant:
        """The static choice for training step `step`, the same on every host."""
        return None

    def loss(
        self, model: nn.Module, params: Any, batch: Batch, key: jax.Array, variant: Variant
    ) -> tuple[Means, Means]:
        """What training lowers, and what is only reported.

        Args:
          model: the module; its variables are `{"params": params}`.
          params: unboxed parameters.
          batch: global arrays; sums over their leading axis run over all devices.
          key: the random key of this step, the same for all parts of its batch.
          variant: what `variant` chose; None in evaluation, which is the model at its fullest.

        Returns:
          The terms of the loss, which training adds up, one of them called `loss`; and further
          metrics. No weight of a term depends on `params`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")
