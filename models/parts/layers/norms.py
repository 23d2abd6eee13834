"""Normalisation over the last axis, or over batches, groups and grids; computed in float32."""

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


class BatchNorm(nn.Module):
    """`(x - mean) / std * scale + bias` for every channel. Follows: arXiv:1502.03167.

    In training, mean and variance are those of the batch, over all its devices, and the running
    ones in the collection `stats` move towards them, if it is mutable; otherwise the running ones
    are used. As in torch, the running variance is the unbiased one.

    Attributes:
      eps: added to the variance.
      momentum: how far the running statistics move, the share of the new (torch's convention; that
        of Flax is 1 less it).
      affine: whether there are a scale and a bias.
      start: the first value of the scale.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    affine: bool = True
    start: float = 1.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, ..., C] to the same shape."""
        width = x.shape[-1]
        scale, bias = _scale_and_bias(self, width, self.start) if self.affine else (1.0, 0.0)
        mean = self.variable("stats", "mean", jnp.zeros, (width,), jnp.float32)
        var = self.variable("stats", "var", jnp.ones, (width,), jnp.float32)
        if not train:
            return _normalised(x, mean.value, var.value, self.eps, scale, bias)
        axes = tuple(range(x.ndim - 1))
        m, v = _moments(x, axes)
        if self.is_mutable_collection("stats") and not self.is_initializing():
            count = x.size // width
            unbiased = v.reshape(-1) * (count / max(count - 1, 1))
            mean.value += self.momentum * (m.reshape(-1) - mean.value)
            var.value += self.momentum * (unbiased - var.value)
        return _normalised(x, m, v, self.eps, scale, bias)


class GroupNorm(nn.Module):
    """`(x - mean) / std * scale + bias` for every example and every group of neighbouring channels.
    Follows: arXiv:1803.08494.

    Attributes:
      groups: how many, a divisor of the channels.
      eps: added to the variance.
    """

    groups: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, ..., C] to the same shape."""
        width = x.shape[-1]
        if width % self.groups:
            raise ValueError(f"groups = {self.groups}: want a divisor of {width} channels")
        scale, bias = _scale_and_bias(self, width)
        y = x.reshape(x.shape[0], -1, self.groups, width // self.groups)
        mean, var = _moments(y, (1, 3))
        by_group = (self.groups, -1)
        scale, bias = scale.reshape(by_group), bias.reshape(by_group)
        return _normalised(y, mean, var, self.eps, scale, bias).reshape(x.shape)


class InstanceNorm(nn.Module):
    """`(x - mean) / std * scale + bias` for every example and channel. Follows: arXiv:1607.08022.

    Attributes:
      eps: added to the variance.
      affine: whether there are a scale and a bias.
    """

    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, ..., C] to the same shape."""
        scale, bias = _scale_and_bias(self, x.shape[-1]) if self.affine else (1.0, 0.0)
        mean, var = _moments(x, tuple(range(1, x.ndim - 1)))
        return _normalised(x, mean, var, self.eps, scale, bias)


GridNorm = Literal["batch", "layer", "instance"]
"""Norms of feature maps [B, ..., C]; "layer" is over the channels of every place."""


def make_grid_norm(kind: GridNorm, eps: float) -> nn.Module:
    """The norm of a feature map that a configuration names."""
    return {"batch": BatchNorm, "layer": LayerNorm, "instance": InstanceNorm}[kind](eps)


def _scale_and_bias(module: nn.Module, width: int, start: float = 1.0) -> tuple[Array, Array]:
    """The parameters of a norm, [C] each, starting from `start` and 0."""
    ones = nn.with_logical_partitioning(nn.initializers.constant(start), ("norm",))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
    return module.param("scale", ones, (width,)), module.param("bias", zeros, (width,))


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and biased variance in float32, with axes of length 1 where they were taken."""
    y = x.astype(jnp.float32)
    mean = y.mean(axes, keepdims=True)
    return mean, jnp.square(y - mean).mean(axes, keepdims=True)


def _normalised(
    x: Array, mean: Array, var: Array, eps: float, scale: Array | float, bias: Array | float
) -> Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias`, computed in float32."""
    y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + eps) * scale)
    return (y + bias).astype(x.dtype)
