"""The pre-norm decoder with grouped-query attention and rotary positions: the Llama family.

Follows: arXiv:2302.13971, arXiv:2307.09288.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.keytable import Row, Table, linear
from zoo.models.core.names import shard
from zoo.models.core.types import Array, Aux, Memory, Stream
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.embed import Embed
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.layers.norms import RMSNorm
from zoo.models.parts.layers.stack import Stack, Step, layers

Plan = tuple[Step, ...]
PlanRule = Callable[[Plan], Plan]
"""Turns the plan of a plain decoder into another: wraps policies around steps, inserts or drops
some.
"""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. The defaults are Llama-2 7B and Vicuna 7B.

    Attributes:
      vocab_size: V.
      width: D.
      depth: number of layers.
      num_heads: query heads.
      num_kv_heads: key-value heads; a divisor of `num_heads`.
      mlp_dim: hidden width of the gated MLP.
      head_dim: width / num_heads by default.
      rope_theta: base of the rotary embedding.
      norm_eps: epsilon of the RMSNorms.
      tie_embeddings: the head is the transposed vocabulary table.
      dtype: in which activations are computed; parameters stay float32.
    """

    vocab_size: int = 32_000
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    mlp_dim: int = 11_008
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dtype: str = "float32"

    def plan(self) -> Plan:
        """The plain decoder: `depth` equal layers without policies."""
        block = Block(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            parent=None,
        )
        return layers(block, self.depth)


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
        self.embedding = Embed(c.vocab_size, c.width)
        self.stack = Stack(self.plan)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Proj("...d,dv->...v", (c.width, c.vocab_size), ("vocab_embed", "vocab"))

    def embed(self, ids: Array) -> Array:
        """[B, L] int -> [B, L, D] in the compute dtype.

        Ids outside the vocabulary read its last row.
        """
        x = self.embedding(jnp.clip(ids, 0, self.config.vocab_size - 1))
        return x.astype(self.config.dtype)

    def run(
        self, stream: Stream, states: Any = None, memory: Memory | None = None
    ) -> tuple[Stream, Any, tuple[Aux, ...]]:
        """All layers and the final norm. `states` as in `Stack`."""
        hidden = shard(stream.hidden, "batch", "seq", "act_embed")
        stream, states, aux = self.stack(stream.replace(hidden=hidden), states, memory)
        return stream.replace(hidden=self.final_norm(stream.hidden)), states, aux

    def head(self, hidden: Array) -> Array:
        """[..., D] after the final norm -> float32 logits [..., V]."""
        tied = self.config.tie_embeddings
        logits = self.embedding.attend(hidden) if tied else self.lm_head(hidden)
        return logits.astype(jnp.float32)


def llama_table(config: DecoderConfig) -> Table:
    """Keys of a plain decoder in Hugging Face Llama checkpoints."""
    steps, layer, at = tuple(range(config.depth)), "model.layers.{}.", "stack/layers/"
    rows = [
        Row("embedding/embedding", "model.embed_tokens.weight"),
        Row("final_norm/scale", "model.norm.weight"),
        Row(f"{at}attn_norm/scale", f"{layer}input_layernorm.weight", steps=steps),
        Row(f"{at}mlp_norm/scale", f"{layer}post_attention_layernorm.weight", steps=steps),
    ]
    if not config.tie_embeddings:
        rows.append(Row("lm_head/kernel", "lm_head.weight", linear()))
    maps = {
        "self_attn.q": ("q", 1),
        "self_attn.k": ("k", 1),
        "self_attn.v": ("v", 1),
        "self_attn.o": ("out", 2),
    }
    maps |= {f"mlp.{name}": (name, 1) for name in ("gate", "up", "down")}
    for key, (name, num_in) in maps.items():
        rows.append(Row(f"{at}{name}/kernel", f"{layer}{key}_proj.weight", linear(num_in), steps))
    return Table(tuple(rows))
