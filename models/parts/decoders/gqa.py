"""The decoder with grouped-query attention: Llama and what has grown from it.

Follows: arXiv:2302.13971 (Llama), arXiv:2310.06825 (Mistral), arXiv:2407.10671 (Qwen2),
arXiv:2505.09388 (Qwen3), arXiv:2408.00118 (Gemma 2), arXiv:2404.14219 (Phi-3), arXiv:2205.01068
(OPT).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.keytable import Alias, Row, Table, flat, linear
from zoo.models.core.names import shard
from zoo.models.core.types import Array, Aux, Memory, Stream
from zoo.models.parts.layers.attention import Sliding, causal
from zoo.models.parts.layers.block import Block, NormPlace
from zoo.models.parts.layers.embed import Embed
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import NormKind, make_norm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.layers.sequence import check_length
from zoo.models.parts.layers.stack import Remat, Stack

Plan = tuple[Step, ...]
PlanRule = Callable[[Plan], Plan]
"""Turns the plan of a plain decoder into another: wraps policies around steps, inserts or drops
some.
"""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and kind of a decoder. The defaults are Llama-2 7B and Vicuna 7B.

    Attributes:
      vocab_size: V.
      width: D.
      depth: number of layers.
      num_heads: query heads.
      num_kv_heads: key-value heads; a divisor of `num_heads`.
      mlp_dim: hidden width of the MLP.
      head_dim: width / num_heads by default.
      context: the longest sequence that the model is meant for, in tokens.
      rope: the rotary embedding; None for a decoder without one.
      windows: sliding windows of the layers, None for full attention; repeated over the depth, so
        that (4096, None) alternates. Empty: full attention everywhere.
      norm: the kind of all norms.
      norm_eps: epsilon of all norms.
      norm_place: where a layer has its norms, as in `Block`.
      final_norm: a norm after the last layer.
      activation: of the MLP.
      gated: whether the MLP has a gate.
      qkv_bias: biases on the query, key and value projections.
      out_bias: a bias on the output projection of attention.
      mlp_bias: biases in the MLP.
      qk_norm: a norm over every head of the queries and keys.
      attention_scale: factor of the attention logits; 1 / sqrt(head_dim) by default.
      attention_softcap: bound of the attention logits.
      logit_softcap: bound of the output logits.
      embed_scale: factor of the embedded ids.
      embed_width: width of the vocabulary table; where it is not that of the layers, a linear map
        leads from it and another back. By default the same.
      learned_positions: rows of the table of learned positions; 0 for none.
      first_position: the row of position 0.
      tie_embeddings: the head is the transposed vocabulary table.
      dtype: in which activations are computed; parameters stay float32.
      remat: what layers keep for the gradient, as in `Stack`.
    """

    vocab_size: int = 32_000
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    mlp_dim: int = 11_008
    head_dim: int | None = None
    context: int = 4096
    rope: RopeConfig | None = RopeConfig()
    windows: tuple[int | None, ...] = ()
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    norm_place: NormPlace = "pre"
    final_norm: bool = True
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float | None = None
    embed_width: int | None = None
    learned_positions: int = 0
    first_position: int = 0
    tie_embeddings: bool = False
    dtype: str = "float32"
    remat: Remat = "none"

    def plan(self) -> Plan:
        """The plain decoder: `depth` layers without policies."""
        windows = self.windows or (None,)
        steps = {window: Step(self.block(window)) for window in windows}
        return tuple(steps[windows[layer % len(windows)]] for layer in range(self.depth))

    def block(self, window: int | None = None) -> Block:
        """A layer, with full attention or that of a sliding window."""
        return Block(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm=self.norm,
            norm_eps=self.norm_eps,
            norm_place=self.norm_place,
            activation=self.activation,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=self.qk_norm,
            rope=self.rope,
            scale=self.attention_scale,
            softcap=self.attention_softcap,
            rule=causal if window is None else Sliding(window),
            parent=None,
        )


class Decoder(nn.Module):
    """Embedding, a plan of layers, final norm and head.

    Attributes:
      config: sizes.
      plan: the steps; `config.plan()` for the plain decoder.
    """

    config: DecoderConfig
    plan: Plan

    def setup(self) -> None:
        c = self.config
        outer = c.embed_width or c.width
        self.embedding = Embed(c.vocab_size, outer)
        if outer != c.width:
            self.embed_in = dense(outer, c.width)
            self.embed_out = dense(c.width, outer)
        if c.learned_positions:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("positions", "embed")
            )
            self.position = self.param("position", init, (c.learned_positions, c.width))
        self.stack = Stack(self.plan, remat=c.remat)
        if c.final_norm:
            self.final_norm = make_norm(c.norm, c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Proj("...d,dv->...v", (outer, c.vocab_size), ("vocab_embed", "vocab"))

    def embed(self, ids: Array) -> Array:
        """[B, L] int -> [B, L, D] in the compute dtype, without positions, which `run` adds.

        Ids outside the vocabulary read its last row.
        """
        c = self.config
        x = self.embedding(jnp.clip(ids, 0, c.vocab_size - 1)).astype(c.dtype)
        if c.embed_scale is not None:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        return x if c.embed_width in (None, c.width) else self.embed_in(x)

    def run(
        self, stream: Stream, states: Any = None, memory: Memory | None = None
    ) -> tuple[Stream, Any, tuple[Aux, ...]]:
        """Learned positions, all layers and the final norm. `states` as in `Stack`.

        Raises:
          ValueError: in training, the mesh divides sequences, and theirs does not divide evenly.
        """
        c, hidden = self.config, stream.hidden
        if states is None:
            check_length(hidden.shape[1])
        if c.learned_positions:
            row = stream.tokens.position.astype(jnp.int32) + c.first_position
            hidden = hidden + jnp.take(self.position, row, axis=0).astype(hidden.dtype)
        hidden = shard(hidden, "batch", "seq", "act_embed")
        stream, states, aux = self.stack(stream.replace(hidden=hidden), states, memory)
        if c.final_norm:
            stream = stream.replace(hidden=self.final_norm(stream.hidden))
        return stream, states, aux

    def head(self, hidden: Array) -> Array:
        """[..., D] after the final norm -> float32 logits [..., V]."""
        c = self.config
        if c.embed_width not in (None, c.width):
            hidden = self.embed_out(hidden)
        logits = self.embedding.attend(hidden) if c.tie_embeddings else self.lm_head(hidden)
        logits = logits.astype(jnp.float32)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits


def head_row(config: DecoderConfig, embedding: str) -> Row | Alias:
    """The row of `lm_head.weight`, which tied checkpoints may hold as a copy of `embedding`."""
    if config.tie_embeddings:
        return Alias("lm_head.weight", embedding)
    return Row("lm_head/kernel", "lm_head.weight", linear())


def decoder_table(config: DecoderConfig, prefix: str = "model.") -> Table:
    """Keys of a decoder in Hugging Face checkpoints of the Llama family: `model.…` and `lm_head.…`.

    Architectures that name or fuse their tensors in another way have their own tables.

    Args:
      config: of the decoder.
      prefix: of all keys but `lm_head.…`.
    """
    steps, layer, at = tuple(range(config.depth)), prefix + "layers.{}.", "stack/layers/"
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.norm_place == "sandwich":
        norms = {
            "attn_norm": "input_layernorm",
            "attn_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    maps = {f"self_attn.{name}_proj": (name, config.qkv_bias) for name in ("q", "k", "v")}
    maps["self_attn.o_proj"] = ("out", config.out_bias)
    maps |= {f"mlp.{name}_proj": (name, config.mlp_bias) for name in ("gate", "up", "down")}

    rows: list[Row | Alias] = [
        Row("embedding/embedding", f"{prefix}embed_tokens.weight"),
        Row("final_norm/scale", f"{prefix}norm.weight"),
        head_row(config, f"{prefix}embed_tokens.weight"),
    ]
    for name, key in norms.items():
        rows.append(Row(f"{at}{name}/scale", f"{layer}{key}.weight", steps=steps))
    for key, (name, bias) in maps.items():
        transform = linear(2 if name == "out" else 1)
        rows.append(Row(f"{at}{name}/kernel", f"{layer}{key}.weight", transform, steps))
        if bias:
            rows.append(Row(f"{at}{name}/bias", f"{layer}{key}.bias", flat, steps))
    return Table(tuple(rows))
