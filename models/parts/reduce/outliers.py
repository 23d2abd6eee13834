"""Outliers among scores: local outlier factors on a line. Follows: Breunig et al., SIGMOD 2000."""

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array

LIMIT = 1.5
"""The factor above which a score is an outlier."""


def outlier_factors(x: Array, *, neighbours: int, real: Array | None = None) -> Array:
    """How much thinner the surroundings of each score are than those of its neighbours: about 1 in
    the midst of others, more for one that stands apart.

    Args:
      x: [N], N at least 2. Batches by `jax.vmap`.
      neighbours: how many of the nearest scores are its surroundings; all if there are fewer.
      real: bool [N], the scores that there are; factors of the others mean nothing.

    Returns:
      float32 [N].
    """
    x = x.astype(jnp.float32)
    far = jnp.abs(x[:, None] - x)
    hidden = jnp.eye(x.size, dtype=bool)
    if real is not None:
        hidden |= ~real
    near, who = jax.lax.top_k(jnp.where(hidden, -jnp.inf, -far), min(neighbours, x.size - 1))
    there, near = jnp.isfinite(near), -near  # [N, K]

    def mean(value: Array) -> Array:
        return jnp.where(there, value, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)

    radius = jnp.where(there, near, 0).max(-1)
    density = 1 / (mean(jnp.maximum(near, radius[who])) + 1e-10)
    return mean(density[who]) / density


def count_outliers(x: Array, *, neighbours: int, real: Array | None = None) -> Array:
    """How many of the scores [N] are outliers, above or below: int32 []."""
    found = outlier_factors(x, neighbours=neighbours, real=real) > LIMIT
    return jnp.sum(found if real is None else found & real, dtype=jnp.int32)
