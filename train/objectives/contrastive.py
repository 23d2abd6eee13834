"""Images and texts that belong together, told from those that do not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.names import shard
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
)

_SCALE = "logit_scale"


@dataclass(frozen=True)
class Contrastive(Objective):
    """Every image of a batch is compared with every text of it; the n-th belongs to the n-th.

    What the comparisons cost is as the model pairs (`DualConfig.pairing`). With "softmax" it is the
    cross-entropy of the right text among all texts and of the right image among all images, half of
    each. Follows: arXiv:2103.00020, section 2.3. With "sigmoid" each pair is judged by itself; the
    terms of an image are added up. Follows: arXiv:2303.15343, equation 1. Temperature and bias are
    parameters of the model and are learned with it. What a model reports under a name that ends
    with `_loss` is added.

    The batch is that of all devices together, so that it may not be cut into parts.

    Attributes:
      groups: of how many examples an image sees the texts: those of one of so many equal parts of
        the batch, in their order. 1: of the whole batch. With as many groups as devices share the
        batch, no device needs the embeddings of another.
      max_scale: the factor of the similarities never exceeds it; beyond, its gradient is what it
        would be at the bound. None: it is free. CLIP was trained with 100.
    """

    groups: int = 1
    max_scale: float | None = None

    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UsageError(f"objective.groups is {self.groups}: want 1 or more")
        if self.max_scale is not None and self.max_scale <= 0:
            raise UsageError(f"objective.max_scale is {self.max_scale}: want more than 0, or None")

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """Nothing is carried.

        Raises:
          UsageError: the model does not compare images with texts.
        """
        if not hasattr(model, "compare") or _SCALE not in variables["params"]:
            raise UsageError(
                f"{type(model).__name__} does not compare images with texts: Contrastive wants a "
                "dual encoder such as clip or siglip"
            )
        return {}

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
        """The loss, how often the most similar text and image are the right ones, and the factor of
        the similarities.

        Raises:
          UsageError: groups do not divide the batch.
        """
        variables = self._bounded(variables)
        pairs, carried = applied(model, variables, batch, train=train, key=key)
        size = pairs.image.shape[0]
        if pairs.text.shape[0] != size or size % self.groups:
            raise UsageError(
                f"{size} images and {pairs.text.shape[0]} texts: want as many of both, and a "
                f"multiple of objective.groups = {self.groups}"
            )

        def grouped(x: Array) -> Array:
            return shard(x.reshape(self.groups, -1, x.shape[-1]), "batch", None, None)

        def compared(image: Array, text: Array) -> Array:
            return model.apply(variables, image, text, method="compare")

        if self.groups == 1:
            logits = pairs.logits[None]
        else:
            logits = jax.vmap(compared)(grouped(pairs.image), grouped(pairs.text))
        costs = pairwise_sigmoid if model.config.pairing == "sigmoid" else symmetric_softmax
        weight, place = jnp.float32(size), jnp.arange(size // self.groups)

        def right(axis: int) -> Mean:
            return Mean((logits.argmax(axis) == place).sum(dtype=jnp.float32), weight)

        metrics = {
            "image_to_text": right(-1),
            "text_to_image": right(-2),
            "scale": Mean(jnp.exp(variables["params"][_SCALE]) * weight, weight),
        }
        terms = {"loss": Mean(costs(logits).sum(), weight)}
        losses = {name: x for name, x in pairs.aux.items() if name.endswith("_loss")}
        terms |= {name: Mean(value * weight, weight) for name, value in losses.items()}
        return terms, metrics, carried

    def _bounded(self, variables: Variables) -> Variables:
        """The variables with a scale that is at most `max_scale`."""
        if self.max_scale is None:
            return variables
        scale = variables["params"][_SCALE]
        # As if it were the bound, but its gradient goes through, so that it finds its way back.
        surplus = jax.lax.stop_gradient(jnp.maximum(scale - jnp.log(self.max_scale), 0))
        return {**variables, "params": {**variables["params"], _SCALE: scale - surplus}}


def symmetric_softmax(logits: Array) -> Array:
    """What CLIP pays for each pair: logits [..., B, B] of images and texts -> float32 [..., B]."""

    def among(axis: int) -> Array:
        chances = jax.nn.log_softmax(logits, axis)
        return jnp.diagonal(chances, axis1=-2, axis2=-1)

    return -(among(-1) + among(-2)) / 2


def pairwise_sigmoid(logits: Array) -> Array:
    """What SigLIP pays for each image: logits [..., B, B] -> float32 [..., B]."""
    signs = 2 * jnp.eye(logits.shape[-1], dtype=logits.dtype) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum(-1)
