"""Token by token, from a cache: what a language model has to say to a batch of prompts."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch, Cache


def generate(
    model: nn.Module,
    params: Any,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos_id: int,
    budget: int | Array | None = None,
) -> Array:
    """The most likely next token, again and again, until every row has ended.

    Prefill and decoding are one program, compiled once for each model, shape of the batch, number
    of new tokens and static budget; models of equal configuration share it.

    Args:
      model: has the methods `prefill` and `decode`.
      params: its unboxed parameters.
      batch: prompts of any lengths, padded on the right with `text_mask` False.
      max_new_tokens: how long an answer may be, its `eos_id` included; 1 or more.
      eos_id: the token that ends an answer.
      budget: vision tokens per image, where the model can vary them. A Python number is static:
        only so many are computed, by a program of their own. An array, [] or [B], masks the others:
        one program for all budgets. Both give the same answers.

    Returns:
      int32 [B, max_new_tokens], filled up with `eos_id` after the end of an answer.

    Raises:
      UsageError: `max_new_tokens` is less than 1.
      ValueError: the model cannot take this static budget.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: want 1 or more")
    static = None if isinstance(budget, jax.Array) else budget
    masked = budget if isinstance(budget, jax.Array) else None
    prompts = {name: array for name, array in batch.items() if name != "labels"}
    return _generate(model, params, prompts, jnp.int32(eos_id), masked, static, max_new_tokens)


class _Loop(NamedTuple):
    """What one turn of the decoding loop hands to the next."""

    done: Array  # [], tokens that all rows have
    ids: Array  # [B, n]
    ended: Array  # bool [B]
    cache: Cache


@functools.partial(jax.jit, static_argnames=("model", "budget", "length"))
def _generate(
    model: nn.Module,
    params: Any,
    prompts: Batch,
    eos: Array,
    masked_budget: Array | None,
    budget: int | None,
    length: int,
) -> Array:
    variables = {"params": params}
    chosen = masked_budget if budget is None else budget
    prefill = functools.partial(model.apply, variables, method="prefill")
    decode = functools.partial(model.apply, variables, method="decode")

    def choose(logits: Array, ended: Array) -> Array:
        return jnp.where(ended, eos, logits.argmax(-1).astype(jnp.int32))  # [B]

    def unfinished(loop: _Loop) -> Array:
        return (loop.done < length) & ~loop.ended.all()

    def turn(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(loop.ids, loop.done - 1, 1, axis=1)  # [B, 1]
        logits, cache = decode(last, loop.cache)
        token = choose(logits, loop.ended)
        ids = jax.lax.dynamic_update_slice_in_dim(loop.ids, token[:, None], loop.done, axis=1)
        return _Loop(loop.done + 1, ids, loop.ended | (token == eos), cache)

    # The last token is never read back, so the cache needs no room for it.
    logits, cache = prefill(prompts, room=length - 1, budget=chosen)
    token = choose(logits, jnp.zeros(logits.shape[:1], bool))
    ids = jnp.full((logits.shape[0], length), eos, jnp.int32).at[:, 0].set(token)
    start = _Loop(jnp.int32(1), ids, token == eos, cache)
    return jax.lax.while_loop(unfinished, turn, start).ids
