"""Retention: attention without a softmax whose weights decay with distance, in three forms that
compute the same: all at once, token by token, and chunk by chunk.

    y_n = sum over m <= n of gamma^(n - m) (q_n · k_m) v_m

Queries come scaled; every head has its own gamma. Follows: arXiv:2307.08621.
"""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array


def log_decays(num_heads: int, slow: float = 1 / 32, fast: float = 1 / 512) -> np.ndarray:
    """The logarithm of gamma of every head, float64 [H]: 1 - gamma falls from `slow` to `fast` in
    equal ratios.
    """
    return np.log1p(-np.exp(np.linspace(np.log(slow), np.log(fast), num_heads)))


def decay_mask(log_gamma: np.ndarray, length: int) -> np.ndarray:
    """What a token makes of those before it, float32 [H, L, L]: gamma^(n - m), and 0 for m > n."""
    distance = np.arange(length)[:, None] - np.arange(length)
    weight = np.exp(log_gamma[:, None, None] * np.maximum(distance, 0))
    return np.where(distance >= 0, weight, 0).astype(np.float32)


def retain(q: Array, k: Array, v: Array, log_gamma: np.ndarray, *, softmax: bool = False) -> Array:
    """All tokens at once.

    Args:
      q: [B, L, H, E], scaled.
      k: [B, L, H, E].
      v: [B, L, H, E].
      log_gamma: [H].
      softmax: the weights go through a softmax over all keys, for which those of later tokens are
        logits of 0: neither causal nor what the other forms compute, but what the official ViR
        trains with.

    Returns:
      [B, L, H, E].
    """
    scores = jnp.einsum("blhe,bshe->bhls", q, k, preferred_element_type=jnp.float32)
    weights = scores * decay_mask(log_gamma, q.shape[1])
    weights = jax.nn.softmax(weights, -1) if softmax else weights
    return jnp.einsum("bhls,bshe->blhe", weights.astype(v.dtype), v)


def no_state(q: Array, v: Array) -> Array:
    """What has been seen before the first token: zeros, float32 [B, H, E, E']."""
    return jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.float32)


def retain_tokens(
    q: Array, k: Array, v: Array, log_gamma: np.ndarray, state: Array | None = None
) -> tuple[Array, Array]:
    """Token by token: the memory that it takes does not grow with the sequence.

    Args:
      q: [B, L, H, E], scaled; k and v likewise.
      k: see `q`.
      v: see `q`.
      log_gamma: [H].
      state: float32 [B, H, E, E], what an earlier call returned; None at the beginning.

    Returns:
      [B, L, H, E], and the state after the last token.
    """
    gamma = jnp.asarray(np.exp(log_gamma), jnp.float32)[:, None, None]

    def step(state: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v = (x.astype(jnp.float32) for x in row)
        state = gamma * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhe,bhef->bhf", q, state)

    rows = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v))
    state, y = jax.lax.scan(step, no_state(q, v) if state is None else state, rows)
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state


def retain_chunks(
    q: Array, k: Array, v: Array, log_gamma: np.ndarray, size: int, state: Array | None = None
) -> tuple[Array, Array]:
    """Chunk by chunk: as `retain` inside a chunk and as `retain_tokens` from one to the next.

    Args:
      q: [B, L, H, E], scaled; k and v likewise.
      k: see `q`.
      v: see `q`.
      log_gamma: [H].
      size: tokens of a chunk; the last one may be shorter.
      state: as in `retain_tokens`.

    Returns:
      As `retain_tokens`.
    """
    if size < 1:
        raise ValueError(f"size = {size}: want chunks of 1 token or more")
    state = no_state(q, v) if state is None else state
    whole = q.shape[1] // size * size
    found = []
    if whole:

        def cut(x: Array) -> Array:
            x = x[:, :whole].reshape(x.shape[0], -1, size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        def step(state: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            y, state = _chunk(*row, log_gamma, state)
            return state, y

        state, y = jax.lax.scan(step, state, (cut(q), cut(k), cut(v)))
        found.append(jnp.moveaxis(y, 0, 1).reshape(q.shape[0], whole, *v.shape[2:]))
    if whole < q.shape[1]:
        y, state = _chunk(q[:, whole:], k[:, whole:], v[:, whole:], log_gamma, state)
        found.append(y)
    return jnp.concatenate(found, 1), state


def _chunk(
    q: Array, k: Array, v: Array, log_gamma: np.ndarray, state: Array
) -> tuple[Array, Array]:
    """One chunk after what the state holds."""
    size = q.shape[1]
    place = np.arange(size)
    since = np.exp(np.outer(place + 1, log_gamma)).astype(np.float32)  # [L, H]
    until = np.exp(np.outer(size - 1 - place, log_gamma)).astype(np.float32)
    q32 = q.astype(jnp.float32)
    across = since[:, :, None] * jnp.einsum("blhe,bhef->blhf", q32, state)
    kept = np.exp(size * log_gamma).astype(np.float32)[:, None, None] * state
    new = jnp.einsum("blhe,blhf->bhef", k.astype(jnp.float32) * until[:, :, None], v)
    return retain(q, k, v, log_gamma) + across.astype(v.dtype), kept + new
