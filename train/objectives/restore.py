"""Restoration of pictures: super-resolution, denoising, whatever has a picture as its answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.tree import check_shape
from zoo.models.core.types import Batch
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
)


@dataclass(frozen=True)
class Restore(Objective):
    """The mean squared error between a model's `image` and the batch's `target`, in [0, 1].

    A shuffle of pixels does not change it: for a model that makes pixels of channels it is the
    error before the shuffle, against the rearranged target. Follows: arXiv:1609.05158, equation 5.
    """

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """The picture that the model is to make, of the size that it makes."""
        made, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), inputs)
        return {"target": jax.ShapeDtypeStruct(made.image.shape, jnp.float32)}

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
        """The error, and `psnr`, the mean over pictures of decibels, of what is clipped to [0, 1].

        Args:
          model: returns something with `image` [B, H, W, C].
          variables: as of `Objective.loss`.
          aux: likewise.
          batch: what the model takes, and `target` [B, H, W, C].
          key: as of `Objective.loss`.
          variant: likewise.
          train: likewise.

        Raises:
          ValueError: the target has another shape than the picture.
        """
        out, carried = applied(model, variables, batch, train=train, key=key)
        target = batch["target"].astype(jnp.float32)
        check_shape("target", target, "that of the model's picture", *out.image.shape)
        each = jnp.square(out.image - target).mean((1, 2, 3))  # [B]
        shown = jnp.square(jnp.clip(out.image, 0, 1) - target).mean((1, 2, 3))
        decibels = -10 * jnp.log10(jnp.maximum(shown, 1e-10))
        count = jnp.float32(each.shape[0])
        return {"loss": Mean(each.sum(), count)}, {"psnr": Mean(decibels.sum(), count)}, carried
