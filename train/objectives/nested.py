"""Nested representations: every prefix of an embedding is trained to be one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
    classes_of,
)
from zoo.train.objectives.classify import cross_entropy, hits, smoothed


@dataclass(frozen=True)
class NestedCrossEntropy(Objective):
    """The weighted sum over the prefixes of the cross-entropy of each one's logits.

    Follows: arXiv:2205.13147, equation 1. It is a sum and no mean: with more prefixes the gradient
    grows.

    Attributes:
      weights: c_i of each prefix, the shortest first; empty for 1 each.
      smoothing: the share of a label that is spread over all classes.
    """

    weights: tuple[float, ...] = ()
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if any(weight < 0 for weight in self.weights):
            raise UsageError(f"objective.weights is {self.weights}: want 0 or more each")
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"objective.smoothing is {self.smoothing}: want a share from 0 to 1")

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """One class for each picture."""
        return classes_of(inputs["pixels"].shape[:1])

    def loss(
        self,
        model: nn.Module,
        variables: Variables,
        aux: Mapping[str, Any],
        batch: Batch,
        key: jax.Array,
        variant: Variant,
        *,
        train: bool = True,
    ) -> tuple[Means, Means, Carried]:
        """The sum; and `accuracy` of the whole embedding, `accuracy_8` of its first 8 features...

        Args:
          model: returns `nested` [B, G, K] logits, and `sizes`, the lengths of the G prefixes.
          variables: as of `Objective.loss`.
          aux: likewise.
          batch: what the model takes, and `classes` [B].
          key: as of `Objective.loss`.
          variant: likewise.
          train: likewise.
        """
        out, carried = applied(model, variables, batch, train=train, key=key)
        smoothing = self.smoothing if train else 0.0
        each = nested_cross_entropy(
            out.nested, batch["classes"], weights=self.weights, smoothing=smoothing
        )
        count = jnp.float32(each.size)
        right = {
            f"accuracy_{size}": hits(out.nested[:, number], batch["classes"])["accuracy"]
            for number, size in enumerate(out.sizes)
        }
        right["accuracy"] = right[f"accuracy_{out.sizes[-1]}"]
        means = {name: Mean(value, count) for name, value in right.items()}
        return {"loss": Mean(each.sum(), count)}, means, carried


def nested_cross_entropy(
    logits: Array, classes: Array, *, weights: tuple[float, ...] = (), smoothing: float = 0.0
) -> Array:
    """[B] nats, of logits [B, G, K] and classes [B]: the weighted sum over the prefixes.

    Raises:
      ValueError: not one weight for each prefix.
    """
    prefixes, number = logits.shape[-2:]
    if weights and len(weights) != prefixes:
        raise ValueError(f"weights = {weights}: want one for each of {prefixes} prefixes")
    wanted = smoothed(classes, number, smoothing)[:, None]  # [B, 1, K]
    scale = jnp.asarray(weights or (1.0,) * prefixes)
    return (cross_entropy(logits, wanted) * scale).sum(-1)
