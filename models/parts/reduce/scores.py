"""What attention of the tower says about its patches."""

from typing import Literal

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array

Heads = Literal["mean", "sum", "none"]
"""What becomes of the heads."""


def attention_row(q: Array, k: Array, *, row: int = 0) -> Array:
    """The attention that one token pays to all, float32 [..., H, N], the softmax over all of them.

    Only this row of the N x N map is computed.

    Args:
      q: [..., N, H, E], not scaled.
      k: [..., N, H, E].
      row: which token.
    """
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("...he,...nhe->...hn", q[..., row, :, :], k, **exact)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, -1)


def class_attention(q: Array, k: Array, *, prefix: int = 1, heads: Heads = "mean") -> Array:
    """The attention that the class token pays to the patches, float32 [..., N] or, with `heads`
    "none", [..., H, N]. What it pays to itself is left out, and the rest is not normalised again.

    Args:
      q: [..., 1 + N, H, E], the class token first.
      k: likewise.
      prefix: tokens before the patches.
      heads: what becomes of the heads.
    """
    return _of_heads(attention_row(q, k)[..., prefix:], heads)


def received_attention(q: Array, k: Array, *, prefix: int = 0, heads: Heads = "mean") -> Array:
    """The attention that patches receive from each other on the mean, float32 [..., N].

    The softmax is over all tokens; rows and columns of those before the patches are left out.

    Args:
      q: [..., P + N, H, E].
      k: likewise.
      prefix: P.
      heads: what becomes of the heads.
    """
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("...mhe,...nhe->...hmn", q[..., prefix:, :, :], k, **exact)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, -1)[..., prefix:]
    return _of_heads(weights.mean(-2), heads)


def _of_heads(score: Array, heads: Heads) -> Array:
    """[..., H, N] with its heads as one."""
    if heads == "none":
        return score
    return score.mean(-2) if heads == "mean" else score.sum(-2)
