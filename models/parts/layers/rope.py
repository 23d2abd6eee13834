"""Rotary position embedding. Follows: arXiv:2104.09864, in the half-split form of Llama."""

import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Radians per position, float32 [head_dim / 2]: `theta ** (-2 i / head_dim)`."""
    return (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(
        np.float32
    )


def rotate(x: Array, position: Array, frequencies: np.ndarray) -> Array:
    """Rotate the pairs (x[i], x[i + E / 2]) of every head by `position * frequencies[i]`, in
    float32.

    Args:
      x: [B, L, H, E].
      position: float32 [B, L]; fractions are allowed.
      frequencies: float32 [E / 2].
    """
    angle = position[:, :, None, None] * frequencies  # [B, L, 1, E / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
