"""Vision tokens that leave the decoder between two layers: what scores them, and their removal.

Counts are shares of what the sequence had *before* any layer dropped tokens. That is static for the
slots (`Stream.whole`), and for each row the tag `vision_total` of its tokens, since rows may have
fewer vision tokens than slots.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import IGNORE, IMAGE, Array, Aux, Memory, Stream, Tokens, take
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.block import QKV
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.layers.selection import pick

TURNS = 16
"""Answers of a conversation whose questions rank vision tokens in training, at most."""

NumberOf = Callable[[int], int]
"""How many of so many vision tokens remain; it must not fall where its argument grows."""


def guiding(tokens: Tokens) -> Array:
    """The text that guides a method, bool [B, L]: what the tag `guide` marks, or all of it."""
    text = tokens.valid & (tokens.modality != IMAGE)
    return text & tokens.tags["guide"] if "guide" in tokens.tags else text


def instruction(tokens: Tokens) -> Array:
    """What `guiding` says, without answers that are learned, bool [B, L]."""
    text = guiding(tokens)
    if "label" not in tokens.tags:
        return text
    return text & ~jnp.pad(tokens.tags["label"] != IGNORE, ((0, 0), (1, 0)))[:, :-1]


def last_guiding(tokens: Tokens) -> Array:
    """The place of the last token of the instruction, int [B, 1]."""
    place = jnp.arange(tokens.valid.shape[1])
    return jnp.where(guiding(tokens), place, 0).max(-1, keepdims=True)


def asking(tokens: Tokens, *, turns: int = TURNS) -> tuple[Array, Array]:
    """The tokens after which answers begin.

    In training, where tokens have the tag `label`, these stand before each run of learned tokens,
    the first `turns` of them; else, and where nothing is learned, it is the last of the
    instruction.

    Returns:
      places int [B, R], and which of them are there, bool [B, R].
    """
    last = last_guiding(tokens)
    if "label" not in tokens.tags:
        return last, jnp.ones(last.shape, bool)
    learned = (tokens.tags["label"] != IGNORE) & tokens.valid
    first = learned & ~jnp.pad(learned, ((0, 0), (1, 0)))[:, :-1]
    rows = jnp.argsort(~first, -1, stable=True)[:, :turns]
    there = take(first, rows)
    none = ~there.any(-1, keepdims=True)
    return jnp.where(none, last, rows), there | (none & (jnp.arange(rows.shape[1]) == 0))


def attention_logits(layer: Any, own: QKV, tokens: Tokens, rows: Array | None = None) -> Array:
    """What the softmax of a layer's attention would see, float32 [B, H, R, L]; the smallest number
    where a token is not seen.

    Args:
      layer: the bound block.
      own: its projections of the L tokens.
      tokens: these.
      rows: int [B, R], whose attention; by default that of all.
    """
    q, query = (own.q, tokens) if rows is None else take((own.q, tokens), rows)
    batch, number, heads, width = q.shape
    grouped = q.reshape(batch, number, own.k.shape[2], -1, width)
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("brkge,bske->bkgrs", grouped, own.k, **exact)
    logits *= width**-0.5 if layer.scale is None else layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * jnp.tanh(logits / layer.softcap)
    logits = logits.reshape(batch, heads, number, -1)
    seen = layer.rule(query, tokens)
    if seen is None:
        return logits
    if seen.dtype == jnp.bool_:
        return jnp.where(seen[:, None], logits, jnp.finfo(jnp.float32).min)
    return logits + seen[:, None]


def attention_of(layer: Any, own: QKV, tokens: Tokens, rows: Array, there: Array) -> Array:
    """The mean attention that all tokens get from some, over heads and over these, float32 [B, L].

    Args:
      layer: as in `attention_logits`, like `own` and `tokens`.
      own: see `layer`.
      tokens: see `layer`.
      rows: int [B, R].
      there: bool [B, R], those that count.
    """
    weights = jax.nn.softmax(attention_logits(layer, own, tokens, rows), -1).mean(1)  # [B, R, L]
    mean = there / jnp.maximum(there.sum(-1, keepdims=True), 1)
    return jnp.einsum("br,brl->bl", mean.astype(jnp.float32), weights)


def with_total(stream: Stream) -> tuple[Stream, Array]:
    """The stream whose tokens know how many vision tokens their row had at first, and that number,
    int32 [B].
    """
    tokens = stream.tokens
    if "vision_total" not in tokens.tags:
        image = tokens.valid & (tokens.modality == IMAGE)
        total = jnp.broadcast_to(image.sum(-1, keepdims=True), image.shape).astype(jnp.int32)
        tokens = tokens.replace(tags={**tokens.tags, "vision_total": total})
        stream = stream.replace(tokens=tokens, whole=stream.whole or stream.slots)
    return stream, tokens.tags["vision_total"][:, 0]


def drop(
    stream: Stream,
    score: Array,
    number: NumberOf,
    *,
    hide: bool = False,
    among: Array | None = None,
) -> Stream:
    """The stream with the best of its vision tokens, in their order, and all else.

    Args:
      stream: of any layer.
      score: [B, L].
      number: how many remain of those that a row had at first.
      hide: the others stay where they are, and nobody sees them.
      among: bool [B, L], the only ones that may remain: `number` is then a bound.
    """
    stream, total = with_total(stream)
    counts = np.array([number(n) for n in range(stream.whole + 1)], np.int32)
    capacity = stream.slots if hide else min(int(counts[-1]), stream.slots)
    image = stream.tokens.modality == IMAGE
    fit = stream.tokens.valid if among is None else stream.tokens.valid & among
    score = jnp.where(fit, score, jnp.finfo(jnp.float32).min)
    count = jnp.asarray(counts)[total]
    if among is not None:
        count = jnp.minimum(count, (fit & image).sum(-1))
    index, keep = pick(score, image, count, slots=stream.slots, capacity=capacity)
    hidden, tokens = take((stream.hidden, stream.tokens), index)
    tokens = tokens.replace(valid=tokens.valid & keep)
    return stream.replace(hidden=hidden, tokens=tokens, slots=capacity)


def left_cells(tokens: Tokens) -> Array:
    """The vision tokens that are there, for `zoo.models.parts.reduce.report`: int32 [B, L]."""
    image = tokens.valid & (tokens.modality == IMAGE)
    return jnp.where(image, tokens.tags.get("cell", -1), -1)


@struct.dataclass
class DropBefore(LayerPolicy):
    """Drops vision tokens for good, then runs the layer. A subclass scores them.

    Attributes:
      number: how many remain.
    """

    name: ClassVar[str] = "drop"
    drops: ClassVar[bool] = True

    number: NumberOf = struct.field(pytree_node=False)

    def score(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """Of all tokens, [B, L]; what text gets has no meaning."""
        raise NotImplementedError

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del own
        if stream.slots == 0:
            return run(stream, state)
        score = jax.lax.stop_gradient(self.score(layer, stream, memory))
        stream = drop(stream, score, self.number)
        cells = left_cells(stream.tokens)
        stream, state, _ = run(stream, state)
        return stream, state, {"left_cells": cells}


@struct.dataclass
class DropAfter(LayerPolicy):
    """Runs the layer, then drops vision tokens by its attention. A subclass scores them.

    Attributes:
      number: how many remain; None to drop nothing and to report what there is.
      hide: what is left out stays in the sequence, where nobody sees it.
    """

    name: ClassVar[str] = "drop"
    drops: ClassVar[bool] = True

    number: NumberOf | None = struct.field(pytree_node=False, default=None)
    hide: bool = struct.field(pytree_node=False, default=False)

    def score(self, layer: Any, own: QKV, tokens: Tokens) -> Array:
        """Of all tokens, [B, L], from the projections of the layer."""
        raise NotImplementedError

    def measure(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """Hook: what is to be known of the layer before it runs, [B, L]; by default `score`."""
        # The same products as in the layer, which the compiler merges.
        return self.score(layer, layer.qkv(stream, memory), stream.tokens)

    def after(self, stream: Stream, measured: Array, number: NumberOf) -> Stream:
        """Hook: what is left of the layer's output, by what was measured."""
        return drop(stream, measured, number, hide=self.hide)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del own
        aux = {"left_cells": left_cells(stream.tokens)}
        if stream.slots == 0 or self.number is None:
            return (*run(stream, state)[:2], aux)
        measured = jax.lax.stop_gradient(self.measure(layer, stream, memory))
        stream, state, _ = run(stream, state)
        return self.after(stream, measured, self.number), state, aux


def dropping(plan: Plan, policies: Mapping[int, LayerPolicy]) -> Plan:
    """The plan whose layers drop tokens after they have run, by `policies`; those that come next
    report what is left.
    """
    nexts = {layer + 1 for layer in policies} - {len(plan), *policies}
    return wrap(plan, {**policies, **dict.fromkeys(nexts, DropAfter())})


@struct.dataclass
class Compressed(LayerPolicy):
    """Positions count the tokens that are there, after those in the layer's own cache."""

    name: ClassVar[str] = "compressed"

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del layer, own, memory
        tokens = stream.tokens
        segment = {name: tokens.tags[name] for name in ("segment",) if name in tokens.tags}
        position = Tokens.sequence(tokens.valid, **segment).position
        if (cached := getattr(state, "tokens", None)) is not None:
            position += cached.valid.sum(-1, keepdims=True)
        return run(stream.replace(tokens=tokens.replace(position=position)), state)
