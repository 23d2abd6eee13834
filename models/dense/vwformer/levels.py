"""The four levels of a pyramid that decoders read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, Batch

LEVELS = ("c1", "c2", "c3", "c4")
"""What a batch calls the levels of a pyramid, the finest first."""


def level_inputs(batch_size: int, image_size: int, widths: Sequence[int]) -> Batch:
    """Shapes of the levels of a batch of images of a side, at strides of 4, 8, 16 and 32."""
    sides = [image_size // stride for stride in (4, 8, 16, 32)]
    return {
        name: jax.ShapeDtypeStruct((batch_size, side, side, width), jnp.float32)
        for name, side, width in zip(LEVELS, sides, widths, strict=True)
    }


def levels_of(batch: Batch, widths: Sequence[int], dtype: str) -> list[Array]:
    """The levels [B, h, w, C_i] of a batch, the finest first.

    Raises:
      ValueError: one has other channels.
    """
    found = [batch[name].astype(dtype) for name in LEVELS]
    for name, level, width in zip(LEVELS, found, widths, strict=True):
        if level.ndim != 4 or level.shape[-1] != width:
            raise ValueError(f"{name}: got {level.shape}, want [B, h, w, {width}]")
    return found
