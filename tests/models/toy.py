"""Toy policies and blocks that exercise every feature of the stack; each is the core of a published
method.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import KV, Stream, Tokens, take
from zoo.models.parts.layers.attention import attend, causal
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.plan import LayerPolicy, Step
from zoo.models.parts.layers.selection import pick, put

BATCH, SLOTS, PROMPT, ANSWER, WIDTH = 2, 12, 7, 3, 16
BLOCK = Block(width=WIDTH, num_heads=4, num_kv_heads=2, mlp_dim=24)


@struct.dataclass
class AddTap(LayerPolicy):
    """Adds features of the vision token that a slot holds (`level` is scanned data)."""

    level: Any = 0
    name: ClassVar[str] = "tap"

    def __call__(self, layer, own, run, stream, state, memory):
        if stream.slots == 0:
            return run(stream, state)
        cell, level = stream.tokens.tags["cell"], memory["taps"][self.level]
        add = jnp.where(cell[..., None] >= 0, take(level, jnp.maximum(cell, 0)), 0.0)
        return run(stream.replace(hidden=stream.hidden + add), state)


class Router(nn.Module):
    """One score per token."""

    @nn.compact
    def __call__(self, x):
        return Proj("...d,do->...o", (x.shape[-1], 1), ("embed", None), bias=True)(x)[..., 0]


@struct.dataclass
class Depth(LayerPolicy):
    """Runs only the best `ratio` of the vision tokens; the others bypass the layer, scaled by their
    score.
    """

    ratio: Any = 1.0
    capacity: int = struct.field(pytree_node=False, default=0)
    name: ClassVar[str] = "router"
    splits: ClassVar[bool] = True

    def module(self, block):
        return Router(parent=None)

    def __call__(self, layer, own, run, stream, state, memory):
        tokens, capacity = stream.tokens, min(self.capacity, stream.slots)
        image = tokens.modality == 1
        weight = 1 + 0.2 * jnp.tanh(own(stream.hidden))
        count = jnp.trunc((image & tokens.valid).sum(-1) * self.ratio).astype(int)
        score = jnp.where(tokens.valid, weight, -jnp.inf)
        index, keep = pick(score, image, count, slots=stream.slots, capacity=capacity)
        chosen = take(tokens, index)
        chosen = chosen.replace(valid=chosen.valid & keep)
        sub = Stream(take(stream.hidden, index), chosen, capacity)
        mixed, state, _ = layer.attention(sub, state, memory)
        gate = take(jnp.where(image, weight, 1.0), index)[..., None]
        rows = mixed.hidden + gate * layer.feed_forward(mixed, memory)
        base = jnp.where(image[..., None], weight[..., None] * stream.hidden, stream.hidden)
        hidden = put(base, index, rows, keep)
        return (
            stream.replace(hidden=hidden),
            state,
            {"kept": (keep & (chosen.modality == 1)).sum(-1)},
        )


@struct.dataclass
class Compressed(LayerPolicy):
    """Positions count the valid tokens that this layer sees."""

    name: ClassVar[str] = "compressed"

    def __call__(self, layer, own, run, stream, state, memory):
        before = state.tokens.valid.sum(-1, keepdims=True) if isinstance(state, KV) else 0
        position = before + jnp.cumsum(stream.tokens.valid, -1) - 1
        tokens = stream.tokens.replace(position=position.astype(jnp.float32))
        out, state, aux = run(stream.replace(tokens=tokens), state)
        return out.replace(tokens=out.tokens.replace(position=stream.tokens.position)), state, aux


@struct.dataclass
class Drop(LayerPolicy):
    """Before the layer, keeps the vision tokens that the last prompt token attends to most."""

    keep: int = struct.field(pytree_node=False, default=0)
    name: ClassVar[str] = "drop"

    def __call__(self, layer, own, run, stream, state, memory):
        if stream.slots == 0:
            return run(stream, state)
        tokens = stream.tokens
        q, k, _ = layer.qkv(stream, memory)
        row = jnp.argmax(tokens.tags["query"], -1)[:, None]
        seen = causal(take(tokens, row), tokens)[:, None]
        logits = jnp.einsum(
            "blhe,bshe->bhls", take(q, row), jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        )
        score = jnp.where(seen, logits, -1e9).mean((1, 2))
        image = tokens.modality == 1
        count = (image & tokens.valid).sum(-1) * self.keep // stream.slots
        score = jnp.where(tokens.valid, score, -jnp.inf)
        index, keep = pick(score, image, count, slots=stream.slots, capacity=self.keep)
        kept = take(tokens, index)
        kept = kept.replace(valid=kept.valid & keep)
        return run(Stream(take(stream.hidden, index), kept, self.keep), state)


@struct.dataclass
class SharedBias(LayerPolicy):
    """Adds one learned vector, the same in every layer."""

    name: ClassVar[str] = "bias"
    shared: ClassVar[bool] = True

    def module(self, block):
        return Router(parent=None)

    def __call__(self, layer, own, run, stream, state, memory):
        return run(stream.replace(hidden=stream.hidden + own(stream.hidden)[..., None]), state)


class VisualBlock(Block):
    """A second MLP for vision tokens, under names of its own."""

    def setup_mlp(self):
        super().setup_mlp()
        self.visual_up = dense(self.width, self.mlp_dim)
        self.visual_down = dense(self.mlp_dim, self.width, axes=("mlp", "embed"))

    def feed_forward(self, stream, memory):
        text = super().feed_forward(stream, memory)
        if stream.slots == 0 and not self.is_initializing():
            return text
        image = self.visual_down(nn.silu(self.visual_up(self.mlp_norm(stream.hidden))))
        return jnp.where((stream.tokens.modality == 1)[..., None], image, text)


class SwitchBlock(Block):
    """Replaces the MLP, so that these layers own none of its leaves."""

    def setup_mlp(self):
        self.experts = Proj("...d,xdf->...xf", (3, self.width, self.width), (None, "embed", None))

    def feed_forward(self, stream, memory):
        return nn.silu(self.experts(self.mlp_norm(stream.hidden))).mean(-2)


class TextQueries(Block):
    """Only text queries; a vision token takes its own value."""

    def mix(self, stream, q, k, v, key, memory):
        if stream.slots == 0:
            return super().mix(stream, q, k, v, key, memory)
        own = jnp.repeat(v[:, : q.shape[1]], q.shape[2] // v.shape[2], 2)
        image = stream.tokens.modality == 1
        none = jnp.zeros(q.shape[:1], int)
        index, keep = pick(jnp.zeros(q.shape[:2]), image, none, slots=stream.slots, capacity=0)
        rows = attend(take(q, index), k, v, self.rule, take(stream.tokens, index), key)
        return put(own, index, rows, keep)


def dense_step(*policies, block=BLOCK, stack="layers"):
    return Step(block, policies, stack)


d = dense_step
PLANS = {
    "dense": (d(),) * 6,
    "taps": (d(), *(d(AddTap(i)) for i in range(4)), d()),
    "depth": (d(), d(), *(d(Depth(r, 8)) for r in (0.66, 0.5, 0.34, 0.25))),
    "drop": (
        d(),
        d(Drop(6), Compressed()),
        d(Compressed()),
        d(Drop(3), Compressed()),
        d(Compressed()),
    ),
    "inserted": tuple(
        s for i in range(6) for s in ((d(), d(stack="inner")) if i % 3 == 0 else (d(),))
    ),
    "switch": (d(block=SwitchBlock(width=WIDTH, num_heads=4, mlp_dim=24, num_kv_heads=2)), d()) * 3,
    "visual": (d(block=VisualBlock(width=WIDTH, num_heads=4, mlp_dim=24, num_kv_heads=2)),) * 4,
    "text_queries": (d(block=TextQueries(width=WIDTH, num_heads=4, mlp_dim=24, num_kv_heads=2)),)
    * 4,
    "shared": (d(), d(SharedBias()), d(SharedBias()), d()),
}
_visual = VisualBlock(width=WIDTH, num_heads=4, mlp_dim=24, num_kv_heads=2)
PLANS["mixed"] = (
    d(),
    d(AddTap(0)),
    d(AddTap(1)),
    d(block=_visual),
    d(Depth(0.5, 6), block=_visual),
    d(Depth(0.34, 6), block=_visual),
    d(Drop(6), Compressed()),
    d(Compressed()),
    d(stack="inner"),
)


def stream(length: int, seed: int = 0) -> Stream:
    """BATCH rows: two text tokens, SLOTS image slots (8 of them valid in row 1), text, `length`
    tokens in all; the prompt of row 1 is two tokens shorter than that of row 0.
    """
    rng = np.random.default_rng(seed)
    total = SLOTS + PROMPT + ANSWER
    hidden = rng.normal(size=(BATCH, total, WIDTH)).astype(np.float32)
    modality, valid = np.zeros((BATCH, total), np.int32), np.ones((BATCH, total), bool)
    cell, query = np.full((BATCH, total), -1, np.int32), np.full((BATCH, total), -1, np.int32)
    modality[:, 2 : 2 + SLOTS] = 1
    cell[:, 2 : 2 + SLOTS] = np.arange(SLOTS)
    valid[1, 10 : 2 + SLOTS] = False
    valid[1, SLOTS + PROMPT - 2 : SLOTS + PROMPT] = False
    query[0, SLOTS + PROMPT - 1] = query[1, SLOTS + PROMPT - 3] = 1
    tokens = Tokens.sequence(jnp.asarray(valid), cell=jnp.asarray(cell), query=jnp.asarray(query))
    tokens = tokens.replace(modality=jnp.asarray(modality))
    whole = Stream(jnp.asarray(hidden), tokens, SLOTS)
    return Stream(*jax.tree.map(lambda x: x[:, :length], (whole.hidden, whole.tokens)), SLOTS)


def memory() -> dict:
    taps = np.random.default_rng(7).normal(size=(4, BATCH, SLOTS, WIDTH))
    return {"taps": jnp.asarray(taps, jnp.float32)}
