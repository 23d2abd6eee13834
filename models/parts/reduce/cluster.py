"""Density peaks: clusters around tokens that many are near to, and that are far from denser ones.

Follows: arXiv:2204.08680 (DPC-kNN for tokens), without its random tie-breaking: ties go to the
earlier token.
"""

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array


def distances(x: Array) -> Array:
    """Euclidean distances of tokens [..., N, D], divided by the square root of D, [..., N, N]."""
    x = x.astype(jnp.float32)
    length = jnp.sum(x**2, -1)
    square = (
        length[..., :, None] + length[..., None, :] - 2 * jnp.einsum("...nd,...md->...nm", x, x)
    )
    square = jnp.where(jnp.eye(x.shape[-2], dtype=bool), 0, jnp.maximum(square, 0))
    return jnp.sqrt(square) * x.shape[-1] ** -0.5


def density_peaks(x: Array, number: int, *, neighbours: int) -> tuple[Array, Array]:
    """Clusters of tokens.

    The density of a token is exp(-mean square distance to its nearest `neighbours`, itself among
    them); its score the density times the distance to the nearest token that is denser (the
    greatest distance of all where there is none).

    Args:
      x: [..., N, D].
      number: of clusters.
      neighbours: k, no more than N.

    Returns:
      centres int32 [..., number], by descending score; and the cluster of every token, int32
      [..., N], where centres are in their own.
    """
    far = distances(x)
    near = -jax.lax.top_k(-far, neighbours)[0]
    density = jnp.exp(-jnp.mean(near**2, -1))  # [..., N]
    denser = density[..., None, :] > density[..., :, None]
    most = far.max((-2, -1), keepdims=True)
    score = jnp.where(denser, far, most).min(-1) * density
    centres = jax.lax.top_k(score, number)[1]  # [..., G]
    rows = jnp.take_along_axis(far, centres[..., :, None], -2)  # [..., G, N]
    cluster = rows.argmin(-2).astype(jnp.int32)
    own = jnp.arange(x.shape[-2]) == centres[..., :, None]  # [..., G, N]
    cluster = jnp.where(own.any(-2), own.argmax(-2), cluster)
    return centres.astype(jnp.int32), cluster.astype(jnp.int32)
