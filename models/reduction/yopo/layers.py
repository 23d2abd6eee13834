"""The layers of YOPO: who sees vision tokens, and what is computed for them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.names import shard
from zoo.models.core.types import IMAGE, Array, Aux, Memory, Stream, Tokens, take
from zoo.models.parts.layers.attention import Rule
from zoo.models.parts.layers.block import remembered
from zoo.models.parts.layers.operands import merged
from zoo.models.parts.layers.plan import LayerPolicy, Run


@dataclass(frozen=True)
class Neighbours:
    """The rule that vision tokens see each other within a window of the picture, whichever comes
    first; for all else it is another rule.

    Attributes:
      rule: the other one.
      window: side of the window.
      grid: of a picture or tile.
    """

    rule: Rule
    window: int
    grid: tuple[int, int]

    def __call__(self, query: Tokens, key: Tokens) -> Array:
        near = self._near(query, key)
        given = self.rule(query, key)
        both = _numbered(query)[:, :, None] & _numbered(key)[:, None, :]
        if given is None:
            return near | ~both
        if given.dtype == jnp.bool_:
            return jnp.where(both, near, given)
        bias = jnp.where(near, 0.0, jnp.finfo(given.dtype).min)
        return jnp.where(both, bias.astype(given.dtype), given)

    def _near(self, query: Tokens, key: Tokens) -> Array:
        """Bool [B, L, S], what is no further apart than half a window, in the same picture."""
        (h, w), radius = self.grid, (self.window - 1) // 2
        a, b = query.tags["cell"][:, :, None], key.tags["cell"][:, None, :]
        near = a // (h * w) == b // (h * w)
        near &= jnp.abs(a // w % h - b // w % h) <= radius
        return near & (jnp.abs(a % w - b % w) <= radius)


@struct.dataclass
class CutVision(LayerPolicy):
    """Runs the halves of the layer with less for vision tokens.

    The values of vision tokens are zero in heads that do not read them: what text pays to them
    counts in the denominator alone, also from the cache. So decoding is that of the plain layer.

    Attributes:
      heads: of every head 1 or 0: whether vision tokens use it.
      read: of every head, or of those that share a key, whether it reads vision tokens.
      window: see `Yopo`.
      grid: of a picture or tile.
      mlp_dim: neurons that vision tokens run through.
      repeats: how often keys are repeated, so that heads that share one may differ.
    """

    name: ClassVar[str] = "cut_vision"
    splits: ClassVar[bool] = True

    heads: tuple[float, ...]
    read: tuple[float, ...]
    window: int | None = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)
    mlp_dim: int = struct.field(pytree_node=False)
    repeats: int = struct.field(pytree_node=False)

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
        if not stream.slots and self.repeats == 1:
            return run(stream, state)
        stream, state = self._attention(layer, stream, state, memory)
        hidden = stream.hidden + self._feed_forward(layer, stream, memory)
        return stream.replace(hidden=shard(hidden, "batch", "seq", "act_embed")), state, {}

    def _attention(
        self, layer: Any, stream: Stream, state: Any, memory: Memory
    ) -> tuple[Stream, Any]:
        """The attention half with its residual."""
        (q, k, v), tokens, rule = layer.qkv(stream, memory), stream.tokens, layer.rule
        image = (tokens.modality == IMAGE)[..., None, None]
        if self.repeats > 1:
            k, v = (jnp.repeat(x, self.repeats, axis=2) for x in (k, v))
        if stream.slots:
            v = jnp.where(image, v * _column(self.read, v.dtype), v)
            if self.window is not None:
                rule = Neighbours(rule, self.window, self.grid)
        state, k, v, key = remembered(state, k, v, tokens)
        y = layer.attend(q, k, v, rule, tokens, key, scale=layer.scale, softcap=layer.softcap)
        if stream.slots:
            y = jnp.where(image, y * _column(self.heads, y.dtype), y)
        y = layer.attention_out(y, tokens, memory)
        return stream.replace(hidden=shard(stream.hidden + y, "batch", "seq", "act_embed")), state

    def _feed_forward(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """The MLP branch: text with all neurons, vision with the first of them."""
        if not stream.slots or self.mlp_dim == layer.mlp_dim:
            return layer.feed_forward(stream, memory)
        text, image = _apart(stream)
        order = jnp.concatenate([text, image], 1)
        parts = [Stream(*take((stream.hidden, stream.tokens), index)) for index in (text, image)]
        narrow = narrowed(layer, self.mlp_dim)
        rows = [
            each.feed_forward(x, memory) for each, x in zip((layer, narrow), parts, strict=True)
        ]
        return take(jnp.concatenate(rows, 1), jnp.argsort(order, -1))


@struct.dataclass
class WithoutVision(LayerPolicy):
    """Takes all vision tokens out, then runs the layer. Positions stay.

    The aux is `left_cells`, see `zoo.models.parts.reduce.report`.
    """

    name: ClassVar[str] = "without_vision"
    drops: ClassVar[bool] = True

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
        if not stream.slots:
            return run(stream, state)
        hidden, tokens = take((stream.hidden, stream.tokens), _apart(stream)[0])
        stream, state, _ = run(Stream(hidden, tokens, whole=stream.whole or stream.slots), state)
        return stream, state, {"left_cells": jnp.full(tokens.order.shape, -1, jnp.int32)}


def narrowed(layer: Any, mlp_dim: int) -> Any:
    """The bound block with the first neurons of its MLP alone."""
    params = dict(layer.variables["params"])

    def first(leaf: Any, axis: int) -> Any:
        return jax.lax.slice_in_dim(merged(leaf), 0, mlp_dim, axis=axis)

    for name in ("gate", "up"):
        if name in params:
            cut = {part: first(leaf, -1) for part, leaf in params[name].items()}
            params[name] = cut
    params["down"] = {**params["down"], "kernel": first(params["down"]["kernel"], 0)}
    return layer.clone(parent=None, name=None, mlp_dim=mlp_dim).bind({"params": params})


def _apart(stream: Stream) -> tuple[Array, Array]:
    """The places of everything that is no image slot, int [B, L - slots], and of those that are."""
    order = jnp.argsort(stream.tokens.modality == IMAGE, -1, stable=True)
    number = order.shape[1] - stream.slots
    return order[:, :number], order[:, number:]


def _numbered(tokens: Tokens) -> Array:
    """Bool [B, L], the vision tokens that have a place in a picture: those with a number that no
    other has, as newlines do.
    """
    image = tokens.valid & (tokens.modality == IMAGE)
    cell = tokens.tags["cell"]
    same = (cell[:, :, None] == cell[:, None, :]) & image[:, None, :]
    return image & (same.sum(-1) == 1)


def _column(numbers: tuple[Any, ...], dtype: Any) -> Array:
    """[H, 1]."""
    return jnp.stack(numbers).astype(dtype)[:, None]
