"""Attention: rules that say who sees whom, and `attend`, which applies one.

A *rule* maps query and key `Tokens` to a bool mask or a float bias [B, L, S], or to None where all
see all. `attend` takes the rule and the tokens instead of a mask, so that blockwise and
sequence-parallel kernels can build their part of it where they need it.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array, Tokens, shared
from zoo.models.parts.layers.sequence import exchanged, sequence_ranks


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
        softcap: float | None = None,
    ) -> Array: ...


def causal(query: Tokens, key: Tokens) -> Array:
    """A token sees the valid tokens that do not come after it; with segments, of its own and of
    what all of its example see.
    """
    seen = (query.order[:, :, None] >= key.order[:, None, :]) & key.valid[:, None, :]  # [B, L, S]
    if "segment" in query.tags:
        asking, given = query.tags["segment"][:, :, None], key.tags["segment"][:, None, :]
        seen &= (asking == given) | (shared(asking) == given)
    return seen


@dataclass(frozen=True)
class Sliding:
    """The rule `causal` within a window: a token sees itself and the `window - 1` positions before.

    Distance is that of the positions, which count the valid tokens, so padding in the cache takes
    no place in the window. Caches keep all tokens.
    """

    window: int

    def __call__(self, query: Tokens, key: Tokens) -> Array:
        if query.position.ndim != 2:
            raise ValueError(
                f"positions {query.position.shape}: a sliding window wants one for each token"
            )
        distance = query.position[:, :, None] - key.position[:, None, :]
        return causal(query, key) & (distance < self.window)


def everything(query: Tokens, key: Tokens) -> None:
    """Every token sees every token; for towers whose tokens are all valid."""
    del query, key


@dataclass(frozen=True)
class BySize:
    """Another rule, under which a token counts as often as its tag `size` says it has parts; as it
    is where tokens have no such tag.

    Follows: arXiv:2210.09461, section 3.
    """

    rule: Rule

    def __call__(self, query: Tokens, key: Tokens) -> Array | None:
        seen, size = self.rule(query, key), key.tags.get("size")
        if size is None:
            return seen
        more = jnp.log(size)[:, None, :]  # [B, 1, S]
        if seen is None:
            return jnp.broadcast_to(more, (*query.valid.shape, size.shape[1]))
        if seen.dtype == jnp.bool_:
            return jnp.where(seen, more, jnp.finfo(jnp.float32).min)
        return seen + more


def valid_only(query: Tokens, key: Tokens) -> Array:
    """Every token sees every valid token: bidirectional encoders with padding."""
    return jnp.broadcast_to(key.valid[:, None, :], (*query.valid.shape, key.valid.shape[1]))


def attend(
    q: Array,
    k: Array,
    v: Array,
    rule: Rule,
    query: Tokens,
    key: Tokens,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Softmax attention with grouped keys and values, softmax in float32.

    A query that sees nothing (padding) gets a finite value, which nobody reads. On a mesh that
    divides sequences, those that divide evenly are attended to by `exchanged`.

    Args:
      q: [B, L, H, E].
      k: [B, S, K, E] with H a multiple of K.
      v: [B, S, K, E].
      rule: who sees whom.
      query: tokens of q.
      key: tokens of k and v.
      scale: factor of the logits; 1 / sqrt(E) by default.
      softcap: bound c of the scaled logits, `c tanh(logits / c)`.

    Returns:
      [B, L, H, E] in the dtype of `q`.
    """
    options = {"scale": scale, "softcap": softcap}
    ranks = sequence_ranks()
    if ranks > 1 and q.shape[1] % ranks == k.shape[1] % ranks == 0:
        return exchanged(_attend_whole, q, k, v, rule, query, key, **options)
    return _attend_whole(q, k, v, rule, query, key, **options)


def _attend_whole(
    q: Array,
    k: Array,
    v: Array,
    rule: Rule,
    query: Tokens,
    key: Tokens,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """`attend` where every device has whole sequences."""
    seen = rule(query, key)
    if softcap is None and _platform() != "cpu":
        name = "mask" if seen is not None and seen.dtype == jnp.bool_ else "bias"
        given = {} if seen is None else {name: seen[:, None]}
        return jax.nn.dot_product_attention(q, k, v, scale=scale, **given)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attend_plainly(q, k, v, seen, scale, softcap)


def _platform() -> str:
    """What the program will run on: the devices of the current mesh, of this machine or another."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def _attend_plainly(
    q: Array, k: Array, v: Array, seen: Array | None, scale: float, softcap: float | None
) -> Array:
    """The products written out, so that logits can be capped, and as batches of plain matrices,
    normalised last: on a CPU twice as fast as `jax.nn.dot_product_attention`.
    """
    batch, length, _, width = q.shape
    slots, heads = k.shape[1:3]
    rows = q.reshape(batch, length, heads, -1, width).transpose(0, 2, 3, 1, 4)  # [B, K, G, L, E]
    rows = rows.reshape(batch, heads, -1, width)  # [B, K, G L, E]
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.matmul(rows, k.transpose(0, 2, 3, 1), **exact) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if seen is not None:
        logits = logits.reshape(batch, heads, -1, length, slots)
        given = seen[:, None, None]  # [B, 1, 1, L, S]
        if seen.dtype == jnp.bool_:
            logits = jnp.where(given, logits, jnp.finfo(jnp.float32).min)
        else:
            logits = logits + given
        logits = logits.reshape(batch, heads, -1, slots)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    y = jnp.matmul(weights.astype(v.dtype), v.transpose(0, 2, 1, 3), **exact)  # [B, K, G L, E]
    y = (y / weights.sum(-1, keepdims=True)).astype(q.dtype)
    y = y.reshape(batch, heads, -1, length, width).transpose(0, 3, 1, 2, 4)
    return y.reshape(q.shape)
