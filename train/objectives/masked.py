"""Masked autoencoding: the pixels of the patches that the encoder did not see."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, Batch
from zoo.models.parts.layers.spatial import space_to_depth
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
class MaskedPixels(Objective):
    """The mean squared error of the hidden patches of a masked autoencoder
    (`zoo.models.parts.assemblies.masked`). Follows: arXiv:2111.06377.

    Which patches are hidden is drawn anew for every image, in evaluation too.

    Attributes:
      normalise: targets are patches less their mean, divided by their standard deviation.
    """

    normalise: bool = False

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
        """The error; no further metrics.

        Args:
          model: a `MaskedAutoencoder`.
          variables: as of `Objective.loss`.
          aux: likewise.
          batch: `pixels` [B, H, W, 3].
          key: what the draws come from.
          variant: as of `Objective.loss`.
          train: likewise.
        """
        del aux, variant
        tower, pixels = model.config.tower, batch["pixels"]
        drawn, own = jax.random.split(key)
        draws = jax.random.uniform(drawn, (pixels.shape[0], tower.grid[0] * tower.grid[1]))
        out, carried = applied(model, variables, batch, draws=draws, train=train, key=own)
        target = patch_targets(pixels, tower.patch_size, normalise=self.normalise)
        each = patch_errors(out.patches, target)
        hidden = out.hidden.astype(jnp.float32)
        return {"loss": Mean((each * hidden).sum(), hidden.sum())}, {}, carried


def patch_targets(pixels: Array, patch_size: int, *, normalise: bool = False) -> Array:
    """The patches of images: [B, H, W, C] to float32 [B, N, P P C], rows, columns, channels.

    Args:
      pixels: sides are multiples of `patch_size`.
      patch_size: P.
      normalise: less their mean, divided by their standard deviation (the unbiased one).
    """
    cells = space_to_depth(pixels.astype(jnp.float32), (patch_size,) * 2, "cells_first")
    patches = cells.reshape(cells.shape[0], -1, cells.shape[-1])
    if not normalise:
        return patches
    var = patches.var(-1, keepdims=True, ddof=1)
    return (patches - patches.mean(-1, keepdims=True)) * jax.lax.rsqrt(var + 1e-6)


def patch_errors(patches: Array, target: Array) -> Array:
    """The mean squared error of each patch: two [B, N, F] to float32 [B, N]."""
    return jnp.square(patches.astype(jnp.float32) - target).mean(-1)
