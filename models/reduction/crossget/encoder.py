"""Layers of an encoder that merge tokens by what they have to do with a cross token."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array, Aux, Memory, Stream, Tokens, take
from zoo.models.parts.decoders.dropping import attention_logits
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.layers.attention import BySize
from zoo.models.parts.layers.block import QKV
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.reduce.merge import likeness, match_all, merge_pairs, unit

Importance = Literal["cosine", "attention"]


def merged_at(r: int, tokens: int, protected: int) -> int:
    """How many of so many tokens a layer merges: at most half of those that it may."""
    return max(0, min(r, (tokens - protected) // 2))


def lengths(numbers: tuple[int, ...], tokens: int, *, protected: int = 2) -> tuple[int, ...]:
    """How many of so many tokens, the cross token among them, each layer gets; at last what is
    left.
    """

    def after(left: int, r: int) -> int:
        return left - merged_at(r, left, protected)

    return tuple(itertools.accumulate(numbers, after, initial=tokens))


@dataclass(frozen=True)
class CrossTokens:
    """A policy of an encoder: cross tokens, and what is merged by them.

    Attributes:
      r: tokens that each layer merges; one number for all layers, or one for each.
      protect: tokens at the beginning that are never merged.
      importance: "cosine", between the key of a token and the query of the cross token, or of the
        token that stands for the text; "attention", what the token gets from the cross token and,
        on the mean, from all others.
    """

    r: int | tuple[int, ...] = 16
    protect: int = 1
    importance: Importance = "cosine"

    def __post_init__(self) -> None:
        each = self.r if isinstance(self.r, tuple) else (self.r,)
        if min(each, default=0) < 0 or self.protect < 1:
            raise ValueError(
                f"r = {self.r}, protect = {self.protect}: want 0 tokens or more to merge in a "
                "layer, and 1 or more that stay"
            )
        if self.importance not in ("cosine", "attention"):
            raise ValueError(f"importance = {self.importance!r}: want 'cosine' or 'attention'")

    def numbers(self, depth: int) -> tuple[int, ...]:
        """How many every layer merges.

        Raises:
          ValueError: a number for each of other layers than there are.
        """
        if not isinstance(self.r, tuple):
            return (self.r,) * depth
        if len(self.r) != depth:
            raise ValueError(f"r = {self.r}: {len(self.r)} numbers, and there are {depth} layers")
        return self.r

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan of an encoder whose layers merge."""
        del slots
        numbers = self.numbers(len(plan))
        return tuple(
            replace(
                step,
                block=step.block.clone(rule=BySize(step.block.rule)),
                policies=(*step.policies, self.layer(number, r)),
            )
            for number, (step, r) in enumerate(zip(plan, numbers, strict=True))
        )

    def layer(self, number: int, r: int) -> "CrossLayer":
        """The policy of layer `number`, from 0."""
        return CrossLayer(r, self.protect, self.importance, number == 0)


class CrossToken(nn.Module):
    """A copy of a token, through which no gradient goes, plus a learned vector."""

    @nn.compact
    def __call__(self, leader: Array) -> Array:
        """[..., D] to [..., D]."""
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        token = self.param("token", zeros, (leader.shape[-1],))
        return jax.lax.stop_gradient(leader) + token.astype(leader.dtype)


@struct.dataclass
class CrossLayer(LayerPolicy):
    """A layer of an encoder, see `CrossTokens`.

    It reports `cross` [B, D], the cross token that it has read; `groups` int32 [B, N], which of the
    tokens after it each of those before became a part of; `place` int32 [B, N - r], the place that
    each of these had before the first layer, and `size` float32 [B, N - r], their parts.

    Attributes:
      r: see `CrossTokens`, as all further ones.
      protect: see `r`.
      importance: see `r`.
      first: it adds the cross token, at the end.
    """

    name: ClassVar[str] = "cross"
    splits: ClassVar[bool] = True
    drops: ClassVar[bool] = True

    r: int = struct.field(pytree_node=False)
    protect: int = struct.field(pytree_node=False)
    importance: Importance = struct.field(pytree_node=False)
    first: bool = struct.field(pytree_node=False)

    @property
    def reshapes(self) -> bool:  # type: ignore[override]
        """Whether it merges, or adds a token."""
        return self.first or self.r > 0

    def module(self, block: nn.Module) -> nn.Module:
        """The learned vector of this layer."""
        del block
        return CrossToken(parent=None)

    def order(self, alike: Array) -> Array | None:
        """Hook: the order in which tokens are ranked; None for that of `match_all`."""
        del alike

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del run
        assert own is not None
        stream = with_cross_token(stream) if self.first else stream
        at = leader_of(stream)
        cross = own(take(stream.hidden, at))  # [B, 1, D]
        stream = stream.replace(hidden=jnp.concatenate([stream.hidden[:, :-1], cross], 1))
        stream, state, qkv = layer.attention(stream, state, memory)

        number = stream.hidden.shape[1]
        tokens, there = stream.tokens, jnp.arange(number)
        protected = (there < self.protect) | (there == number - 1) | (there == at)  # [B, N]
        text = "pooled" in tokens.tags
        groups = jnp.broadcast_to(there, protected.shape)
        if r := merged_at(self.r, number, self.protect + 1 + text):
            metric, importance = self.measure(layer, qkv, tokens, at)
            alike = jax.lax.stop_gradient(likeness(metric, protected))
            importance = jax.lax.stop_gradient(importance)
            found = match_all(alike, importance, r, order=self.order(alike))
            groups = found.groups
            size = tokens.tags["size"]
            hidden, size = merge_pairs(stream.hidden, size, found, importance)
            valid = (groups[:, None] == there[: number - r, None]) & tokens.valid[:, None]
            tokens = take(tokens, found.index)
            tags = {**tokens.tags, "size": size}
            tokens = tokens.replace(valid=valid.any(-1), tags=tags)
            stream = stream.replace(hidden=hidden, tokens=tokens)
        stream = stream.replace(hidden=stream.hidden + layer.feed_forward(stream, memory))
        names = ("place", "size")
        report = {name: stream.tokens.tags[name] for name in names}
        return stream, state, {"cross": cross[:, 0], "groups": groups, **report}

    def measure(self, layer: Any, own: QKV, tokens: Tokens, at: Array) -> tuple[Array, Array]:
        """What tokens are compared by, [B, N, C], and how much they matter, float32 [B, N].

        Args:
          layer: the bound block.
          own: its projections.
          tokens: of its input.
          at: int [B, 1], the token whose query is asked.
        """
        if self.importance == "cosine":
            query, key = (x.reshape(*x.shape[:2], -1) for x in (own.q, own.k))
            return key, cosine_importance(key, take(query, at))
        weights = jax.nn.softmax(attention_logits(layer, own, tokens), -1).mean(1)
        return own.k.mean(2), attention_importance(weights)


def cosine_importance(key: Array, query: Array) -> Array:
    """Cosines of keys [B, N, C] with one query [B, 1, C]: float32 [B, N]."""
    return jnp.einsum("bnc,bqc->bn", unit(key), unit(query))


def attention_importance(weights: Array) -> Array:
    """Of attention [B, N, N], what each token gets from the last one, and on the mean from all
    others: [B, N].
    """
    return weights[:, :-1].mean(1) + weights[:, -1]


def leader_of(stream: Stream) -> Array:
    """The token that the cross token is a copy of: the one that stands for a text, or the cross
    token itself; int [B, 1].
    """
    batch, number, _ = stream.hidden.shape
    pooled = stream.tokens.tags.get("pooled")
    if pooled is None:
        return jnp.full((batch, 1), number - 1)
    return jnp.argmax(pooled, -1, keepdims=True)


def with_cross_token(stream: Stream) -> Stream:
    """The stream with one more token at its end, a copy of the first, or of that which stands for a
    text; its tokens have a `size`, and know the `place` that they have now.
    """
    batch, number, _ = stream.hidden.shape
    last = jnp.full((batch, 1), number - 1)
    pooled = stream.tokens.tags.get("pooled")
    first = jnp.zeros((batch, 1), jnp.int32)
    copied = first if pooled is None else leader_of(stream)
    hidden = jnp.concatenate([stream.hidden, take(stream.hidden, copied)], 1)
    added = take(stream.tokens, last)
    tags = {name: jnp.zeros_like(tag) for name, tag in added.tags.items()}
    added = added.replace(
        position=added.position + 1,
        order=added.order + 1,
        valid=jnp.ones((batch, 1), bool),
        tags=tags,
    )
    tokens = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), stream.tokens, added)
    place = jnp.broadcast_to(jnp.arange(number + 1, dtype=jnp.int32), hidden.shape[:2])
    tags = {**tokens.tags, "place": place, "size": jnp.ones(place.shape, jnp.float32)}
    return stream.replace(hidden=hidden, tokens=tokens.replace(tags=tags))
