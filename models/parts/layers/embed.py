"""Vocabulary tables, patch embeddings, and what is said about images that do not fit."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.names import shard
from zoo.models.core.types import Array
from zoo.models.parts.layers.linear import fan_in_init
from zoo.models.parts.layers.operands import contract


class Embed(nn.Module):
    """A vocabulary table [V, D], sharded over the vocabulary only; its transpose may serve as the
    head.
    """

    vocab_size: int
    width: int

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "vocab_embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width))

    def __call__(self, ids: Array) -> Array:
        """Rows of the table: [...] int -> [..., D].

        Where a mesh divides the table, and there are more ids than rows, every device gets all of
        it: that is less to send than what each part of the table has for the ids of all devices.
        """
        table = self.embedding
        if ids.size > self.vocab_size:
            table = shard(table, None, None)
        return jnp.take(table, ids, axis=0)

    def attend(self, x: Array) -> Array:
        """Logits of a tied head: [..., D] -> [..., V]."""
        return contract("...d,vd->...v", x, self.embedding)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [..., h P, w P, C] -> [..., h w, D], rows first.

    Attributes:
      patch_size: P.
      width: D.
      channels: C.
      bias: whether there is a bias.
      trim: sides need be no multiples of P; the rest at the right and the bottom is not seen.
    """

    patch_size: int
    width: int
    channels: int = 3
    bias: bool = True
    trim: bool = False

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        p, c = self.patch_size, self.channels
        if self.trim:
            height, width = pixels.shape[-3:-1]
            pixels = pixels[..., : height // p * p, : width // p * p, :]
        check_pixels(pixels, channels=c, multiple=p)
        *lead, height, width, _ = pixels.shape
        x = pixels.reshape(*lead, height // p, p, width // p, p, c)
        axes = (None, None, "conv_in", "conv_out")
        init = nn.with_logical_partitioning(fan_in_init((0, 1, 2), (3,)), axes)
        kernel = self.param("kernel", init, (p, p, c, self.width))
        y = contract("...hpwqc,pqcd->...hwd", x, kernel)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            y = y + self.param("bias", zeros, (self.width,)).astype(y.dtype)
        return y.reshape(*lead, (height // p) * (width // p), self.width)  # [..., N, D]


def check_pixels(
    pixels: Any, *, channels: int = 3, side: int | None = None, multiple: int = 1, least: int = 1
) -> None:
    """Raise a ValueError that says what is wrong unless images are as a model takes them.

    With `jax.debug_nans` on, numbers that are not finite are refused as well; inside of `jax.jit`
    JAX itself reports them then, by running the program again without compiling it.

    Args:
      pixels: [..., H, W, C], normalised.
      channels: C.
      side: H and W; None for any.
      multiple: H and W are multiples of it.
      least: H and W are no less than it.
    """
    shape = tuple(pixels.shape)
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(
            f"pixels: got {pixels.dtype}, want floats: scaled to 0 to 1, less the mean and divided "
            "by the standard deviation that the model was trained with"
        )
    sides = shape[-3:-1]
    fits = len(shape) >= 3 and shape[-1] == channels
    if not fits or (side is not None and sides != (side, side)):
        size = "height, width" if side is None else f"{side}, {side}"
        raise ValueError(f"pixels: got {shape}, want [..., {size}, {channels}], channels last")
    if min(sides) < least:
        raise ValueError(f"pixels: got {shape}, want sides of {least} pixels or more")
    if any(length % multiple for length in sides):
        raise ValueError(
            f"pixels: got {shape}, want [..., height, width, {channels}] "
            f"with both sides multiples of {multiple}"
        )
    if jax.config.jax_debug_nans and not isinstance(pixels, jax.core.Tracer):
        bad = np.argwhere(~np.isfinite(np.asarray(pixels, np.float32)))
        if len(bad):
            first = tuple(bad[0].tolist())
            raise ValueError(
                f"pixels: {len(bad)} numbers are NaN or infinite, the first at {first}"
            )
