"""Vocabulary tables and patch embeddings."""

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.types import Array
from zoo.models.parts.layers.linear import contract, fan_in_init


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
        """Rows of the table: [...] int -> [..., D]."""
        return jnp.take(self.embedding, ids, axis=0)

    def attend(self, x: Array) -> Array:
        """Logits of a tied head: [..., D] -> [..., V]."""
        return contract("...d,vd->...v", x, self.embedding)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [..., h P, w P, C] -> [..., h w, D], rows first."""

    patch_size: int
    width: int
    channels: int = 3
    bias: bool = True

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        p, c = self.patch_size, self.channels
        *lead, height, width, channels = pixels.shape
        if channels != c or height % p or width % p:
            raise ValueError(
                f"pixels: got {pixels.shape}, want [..., height, width, {c}] "
                f"with both sides multiples of {p}"
            )
        x = pixels.reshape(*lead, height // p, p, width // p, p, c)
        axes = (None, None, "conv_in", "conv_out")
        init = nn.with_logical_partitioning(fan_in_init((0, 1, 2), (3,)), axes)
        kernel = self.param("kernel", init, (p, p, c, self.width))
        y = contract("...hpwqc,pqcd->...hwd", x, kernel)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            y = y + self.param("bias", zeros, (self.width,)).astype(y.dtype)
        return y.reshape(*lead, (height // p) * (width // p), self.width)  # [..., N, D]
