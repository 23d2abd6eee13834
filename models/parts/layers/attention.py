"""Attention: rules that say who sees whom, and `attend`, which applies one.

A *rule* maps query and key `Tokens` to a bool mask or a float bias [B, L, S], or to None where all
see all. `attend` takes the rule and the tokens instead of a mask, so that blockwise and
sequence-parallel kernels can build their part of it where they need it.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, Tokens


class Rule(Protocol):
    """Who sees whom: bool mask or float bias [B, L, S], None for no restriction."""

    def __call__(self, query: Tokens, key: Tokens) -> Array | None: ...


class Attend(Protocol):
    """Attention of q [B, L, H, E] over k, v [B, S, K, E] under a rule; returns [B, L, H, E]."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        rule: Rule,
        query: Tokens,
        key: Tokens,
        *,
        scale: float | None = None,
    ) -> Array: ...


def causal(query: Tokens, key: Tokens) -> Array:
    """A token sees the valid tokens that do not come after it; with segments, of its own and of
    segment 0.
    """
    seen = (query.order[:, :, None] >= key.order[:, None, :]) & key.valid[:, None, :]  # [B, L, S]
    if "segment" in query.tags:
        own = query.tags["segment"][:, :, None] == key.tags["segment"][:, None, :]
        seen &= own | (key.tags["segment"] == 0)[:, None, :]
    return seen


def everything(query: Tokens, key: Tokens) -> None:
    """Every token sees every token; for towers whose tokens are all valid."""
    del query, key


def attend(
    q: Array,
    k: Array,
    v: Array,
    rule: Rule,
    query: Tokens,
    key: Tokens,
    *,
    scale: float | None = None,
) -> Array:
    """Softmax attention with grouped keys and values, softmax in float32.

    A query that sees nothing (padding) gets a finite value, which nobody reads.

    Args:
      q: [B, L, H, E].
      k: [B, S, K, E] with H a multiple of K.
      v: [B, S, K, E].
      rule: who sees whom.
      query: tokens of q.
      key: tokens of k and v.
      scale: factor of the logits; 1 / sqrt(E) by default.

    Returns:
      [B, L, H, E] in the dtype of `q`.
    """
    seen = rule(query, key)
    if seen is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale)
    if seen.dtype == jnp.bool_:
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale)
    return jax.nn.dot_product_attention(q, k, v, bias=seen[:, None], scale=scale)
