"""A transformer layer that also reads a context. Follows: arXiv:1706.03762."""

from typing import Any

import jax.numpy as jnp

from zoo.models.core.tree import check_shape
from zoo.models.core.types import Array, Memory, Stream, Tokens
from zoo.models.parts.layers.attention import valid_only
from zoo.models.parts.layers.block import QKV, Block
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.layers.norms import make_norm


class CrossBlock(Block):
    """A `Block` with a cross-attention half between its two, its norm in the same place as theirs.

    It reads `memory["context"]` [B, S, C] and, where some of it is padding,
    `memory["context_mask"]` bool [B, S]. Without a context it is skipped. Its keys and values are
    computed anew at every call, in decoding too.

    Attributes:
      context_width: C.
    """

    context_width: int = 768

    def setup(self) -> None:
        super().setup()
        if self.norm_place == "sandwich":
            raise ValueError("norm_place = 'sandwich': cross-attention has 'pre' and 'post' only")
        c, d, h = self.context_width, self.width, self.num_heads
        e = self.head_dim or d // h
        axes, out = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.cross_q = Proj("bld,dhe->blhe", (d, h, e), axes, bias=self.qkv_bias)
        self.cross_k = Proj("bsc,che->bshe", (c, h, e), axes, bias=self.qkv_bias)
        self.cross_v = Proj("bsc,che->bshe", (c, h, e), axes, bias=self.qkv_bias)
        self.cross_out = Proj("blhe,hed->bld", (h, e, d), out, num_in=2, bias=self.out_bias)
        self.cross_norm = make_norm(self.norm, self.norm_eps)

    def attention(self, stream: Stream, state: Any, memory: Memory) -> tuple[Stream, Any, QKV]:
        """Self-attention, then cross-attention, each with its residual and norm."""
        stream, state, own = super().attention(stream, state, memory)
        if "context" in memory:
            stream = self.cross_attention(stream, memory)
        return stream, state, own

    def cross_attention(self, stream: Stream, memory: Memory) -> Stream:
        """The cross-attention half with its residual and norm."""
        context, t, is_post = memory["context"], stream.tokens, self.norm_place == "post"
        check_shape("context", context, "[B, S, C]", len(stream.hidden), None, self.context_width)
        mask = memory.get("context_mask")
        valid = jnp.ones(context.shape[:2], bool) if mask is None else mask.astype(bool)
        check_shape("context_mask", valid, "[B, S]", *context.shape[:2])
        key = Tokens.sequence(valid)
        x = stream.hidden if is_post else self.cross_norm(stream.hidden)
        q = self.project("cross_q", x, t, memory)
        read = context.astype(x.dtype)
        k, v = (self.project(name, read, key, memory) for name in ("cross_k", "cross_v"))
        y = self.attend(q, k, v, valid_only, t, key)  # [B, L, H, E]
        y = stream.hidden + self.project("cross_out", y, t, memory)
        return stream.replace(hidden=self.cross_norm(y) if is_post else y)

    def probe(self, stream: Stream) -> Array:
        """Touches every parameter; used for initialisation only."""
        context = jnp.zeros((len(stream.hidden), 1, self.context_width))
        return self(stream, None, {"context": context})[0].hidden
