"""Logits of a few tokens at a time, because those of all of them may not fit in memory."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array
from zoo.models.parts.layers.sequence import sequence_ranks

WHOLE_LOGITS = 1 << 23
"""The most logits of one example, tokens x vocabulary, that are computed at once by default."""

T = TypeVar("T")


def chunk_of(head: Callable[[Array], Array], hidden: Array, chunk: int | None) -> int:
    """`chunk` tokens; by default as many as keep within `WHOLE_LOGITS` an example on each of the
    devices that share its sequence.

    Args:
      head: hidden states to logits.
      hidden: [B, L, D].
      chunk: None for the default.
    """
    if chunk is not None:
        return chunk
    vocabulary = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    return max(1, WHOLE_LOGITS // vocabulary) * sequence_ranks()


def in_chunks(
    sums: Callable[..., T], arrays: Sequence[Array], fillers: Sequence[int], chunk: int
) -> T:
    """`sums(*arrays)`, computed for `chunk` tokens at a time and again for the gradient.

    The tokens of a chunk are spread over the sequence, so that devices that share it have work in
    every chunk.

    Args:
      sums: of arrays [B, n, ...]; a tree of sums over the tokens.
      arrays: [B, L, ...] each.
      fillers: of each, what stands for no token, of which nothing is added.
      chunk: tokens of a row that are in memory at once.
    """
    length = arrays[0].shape[1]
    if chunk >= length:
        return sums(*arrays)
    count = -(-length // chunk)
    surplus = count * chunk - length

    def cut(x: Array, filler: int) -> Array:
        x = jnp.pad(x, [(0, surplus * (i == 1)) for i in range(x.ndim)], constant_values=filler)
        x = x.reshape(x.shape[0], chunk, count, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)  # [count, B, chunk, ...]

    parts = tuple(map(cut, arrays, fillers))

    def add(total: T, part: Any) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*part)), None

    shapes = jax.eval_shape(sums, *(part[0] for part in parts))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, nothing, parts)[0]
