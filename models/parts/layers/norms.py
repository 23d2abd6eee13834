"""Normalisation over the last axis, computed in float32."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.types import Array

NormKind = Literal["rms", "rms_plus_one", "layer"]


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` over the last axis. Follows: arXiv:1910.07467.

    Attributes:
      eps: added to the mean square.
      plus_one: multiply by `1 + scale`, scale starting from 0.
    """

    eps: float = 1e-6
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        init = nn.with_logical_partitioning(start, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * (1 + scale if self.plus_one else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / std * scale + bias` over the last axis. Follows: arXiv:1607.06450."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],))
        bias = self.param("bias", zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


def make_norm(kind: NormKind, eps: float) -> nn.Module:
    """The norm that a configuration names."""
    if kind == "layer":
        return LayerNorm(eps)
    return RMSNorm(eps, plus_one=kind == "rms_plus_one")
