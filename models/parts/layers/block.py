"""The transformer layer, of towers and decoders alike.

A system that changes the inside of a layer subclasses `Block` through its hooks (`project`, `qkv`,
`mix`, `attention`, `feed_forward`); one that changes the flow around it is a `LayerPolicy`.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn

from zoo.models.core.names import shard
from zoo.models.core.types import KV, Array, Aux, Memory, Reserve, Stream, Tokens
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import Attend, Rule, attend, causal
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import NormKind, make_norm
from zoo.models.parts.layers.rope import RopeConfig, rotate

NormPlace = Literal["pre", "post", "sandwich"]


class QKV(NamedTuple):
    """Projected (and rotated) queries [B, L, H, E], keys and values [B, L, K, E] of one layer's own
    tokens.
    """

    q: Array
    k: Array
    v: Array


class Block(nn.Module):
    """An attention half, then an MLP half, with grouped keys and an optional gated MLP.

    A half f is `x + f(norm(x))` with norms in the place "pre", `norm(x + f(x))` with "post", and
    `x + norm(f(norm(x)))` with "sandwich".

    Attributes:
      width: D of the residual stream.
      num_heads: query heads H.
      mlp_dim: hidden width F of the MLP.
      num_kv_heads: key-value heads K; H by default.
      head_dim: E; width / H by default.
      norm: the kind of all norms.
      norm_eps: epsilon of all norms.
      norm_place: where a half has its norms.
      activation: of the MLP, a name of `ACTIVATIONS`.
      gated: `down(activation(gate(x)) * up(x))` instead of `down(activation(up(x)))`.
      qkv_bias: biases on the query, key and value projections.
      out_bias: a bias on the output projection.
      mlp_bias: biases in the MLP.
      qk_norm: a norm over every head of the queries and keys, before they are rotated.
      rope: the rotary embedding; None for a layer without one.
      scale: factor of the attention logits; 1 / sqrt(E) by default.
      softcap: bound c of the attention logits, `c tanh(logits / c)`; None for none.
      rule: who sees whom; equal and hashable for layers that are to be scanned together.
      attend: the attention kernel.
      key_bias: whether `qkv_bias` means the keys too, whose bias changes nothing.
    """

    width: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_place: NormPlace = "pre"
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig | None = RopeConfig()
    scale: float | None = None
    softcap: float | None = None
    rule: Rule = causal
    attend: Attend = attend
    key_bias: bool = True

    def setup(self) -> None:
        d, h, e = self.width, self.num_heads, self.head_dim or self.width // self.num_heads
        k = self.num_kv_heads or h
        if h % k:
            raise ValueError(f"num_heads = {h} is no multiple of num_kv_heads = {k}")
        if not self.head_dim and d % h:
            raise ValueError(f"width = {d} is no multiple of num_heads = {h}; give head_dim")
        heads, kv = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.attn_norm = make_norm(self.norm, self.norm_eps)
        self.q = Proj("bld,dhe->blhe", (d, h, e), heads, bias=self.qkv_bias)
        key_bias = self.qkv_bias and self.key_bias
        self.k = Proj("bld,dke->blke", (d, k, e), kv, bias=key_bias)
        self.v = Proj("bld,dke->blke", (d, k, e), kv, bias=self.qkv_bias)
        out = ("heads", "head_dim", "embed")
        self.out = Proj("blhe,hed->bld", (h, e, d), out, num_in=2, bias=self.out_bias)
        self.mlp_norm = make_norm(self.norm, self.norm_eps)
        if self.qk_norm:
            self.q_norm = make_norm(self.norm, self.norm_eps)
            self.k_norm = make_norm(self.norm, self.norm_eps)
        if self.norm_place == "sandwich":
            self.attn_post_norm = make_norm(self.norm, self.norm_eps)
            self.mlp_post_norm = make_norm(self.norm, self.norm_eps)
        self.setup_mlp()

    def setup_mlp(self) -> None:
        """Hook: the parts of the MLP branch; whoever replaces the branch replaces this too."""
        d, f = self.width, self.mlp_dim
        if self.gated:
            self.gate = dense(d, f, bias=self.mlp_bias)
        self.up = dense(d, f, bias=self.mlp_bias)
        self.down = dense(f, d, bias=self.mlp_bias, axes=("mlp", "embed"))

    def project(self, name: str, x: Array, tokens: Tokens, memory: Memory) -> Array:
        """Hook: the linear map `name` ("q", "k", "v", "out", "gate", "up", "down") of `x`."""
        del tokens, memory
        return getattr(self, name)(x)

    def qkv(self, stream: Stream, memory: Memory) -> QKV:
        """Hook before the cache: normed, projected, rotated."""
        x = stream.hidden if self.norm_place == "post" else self.attn_norm(stream.hidden)
        q, k, v = (self.project(name, x, stream.tokens, memory) for name in ("q", "k", "v"))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            angle = self.rope.angles(q.shape[-1], stream.tokens.position)
            q, k = (rotate(x, angle, self.rope.amplitude) for x in (q, k))
        return QKV(q, k, v)

    def mix(
        self, stream: Stream, q: Array, k: Array, v: Array, key: Tokens, memory: Memory
    ) -> Array:
        """Hook after the cache: attention of this layer's tokens over keys [B, S]; returns [B, L,
        H, E].
        """
        del memory
        options = {"scale": self.scale, "softcap": self.softcap}
        return self.attend(q, k, v, self.rule, stream.tokens, key, **options)

    def attention(self, stream: Stream, state: Any, memory: Memory) -> tuple[Stream, Any, QKV]:
        """The attention half with its residual; also the layer's own q, k and v, for whoever scores
        tokens.
        """
        own = self.qkv(stream, memory)
        state, k, v, key = remembered(state, own.k, own.v, stream.tokens)
        y = self.mix(stream, own.q, k, v, key, memory)  # [B, L, H, E]
        y = self.attention_out(y, stream.tokens, memory)
        hidden = shard(stream.hidden + y, "batch", "seq", "act_embed")
        if self.norm_place == "post":
            hidden = self.attn_norm(hidden)
        return stream.replace(hidden=hidden), state, own

    def attention_out(self, y: Array, tokens: Tokens, memory: Memory) -> Array:
        """What the heads have read, [B, L, H, E], as the attention branch [B, L, D]."""
        y = self.project("out", y, tokens, memory)
        return self.attn_post_norm(y) if self.norm_place == "sandwich" else y

    def feed_forward(self, stream: Stream, memory: Memory) -> Array:
        """The MLP branch [B, L, D], without the residual and what follows it."""
        x = stream.hidden if self.norm_place == "post" else self.mlp_norm(stream.hidden)
        act, t = ACTIVATIONS[self.activation], stream.tokens
        up = self.project("up", x, t, memory)
        y = act(self.project("gate", x, t, memory)) * up if self.gated else act(up)
        y = self.project("down", y, t, memory)
        return self.mlp_post_norm(y) if self.norm_place == "sandwich" else y

    def __call__(self, stream: Stream, state: Any, memory: Memory) -> tuple[Stream, Any, Aux]:
        stream, state, _ = self.attention(stream, state, memory)
        hidden = stream.hidden + self.feed_forward(stream, memory)
        hidden = shard(hidden, "batch", "seq", "act_embed")
        if self.norm_place == "post":
            hidden = self.mlp_norm(hidden)
        return stream.replace(hidden=hidden), state, {}

    def probe(self, stream: Stream) -> Array:
        """Touches every parameter; used for initialisation only.

        A block that reads memory overrides it.
        """
        return self(stream, None, {})[0].hidden


def remembered(state: Any, k: Array, v: Array, tokens: Tokens) -> tuple[Any, Array, Array, Tokens]:
    """The layer state with new keys and values, and what attention reads then: keys, values and
    their tokens, those of the cache among them.

    Args:
      state: None, `Reserve`, or a cache.
      k: [B, L, K, E].
      v: [B, L, K, E].
      tokens: of the L.
    """
    if isinstance(state, Reserve):
        return KV.start(k, v, tokens, state.n), k, v, tokens
    if state is None:
        return None, k, v, tokens
    state = state.append(k, v, tokens)
    return state, *state.read(), state.tokens
