"""The text transformer of CLIP and SigLIP. Follows: arXiv:2103.00020, arXiv:2303.15343.

CLIP reads from left to right and takes the output at the end-of-text token; SigLIP lets every token
see every other and takes the output at the last place, which may be padding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.keytable import Row, Table, norm_rows
from zoo.models.core.tree import check_shape
from zoo.models.core.types import Array, Aux, Features, Stream, Tokens, take
from zoo.models.parts.decoders.composition import compose
from zoo.models.parts.layers.attention import causal, valid_only
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.embed import Embed
from zoo.models.parts.layers.linear import table_init
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.plan import layers
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.towers.vit import CLIP_LAYER, ViTConfig, layer_rows

Pool = Literal["end", "highest", "last"]


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text transformer. The defaults are those of CLIP ViT-B/32.

    Attributes:
      vocab_size: V.
      max_length: rows of the position table; no text may be longer.
      width: D.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      activation: of the MLP.
      norm_eps: epsilon of the LayerNorms.
      causal: a token sees only those that do not come after it.
      pool: whose output stands for the text: "end", the first token that is `end_id` (the first of
        all where there is none); "highest", the first one with the highest id, which is the end of
        a text in CLIP's own vocabulary; "last", the one in the last place, padding or not.
      end_id: the end-of-text token.
      policies: applied to the plan of the layers in this order, the first innermost; they find the
        token whose output is pooled by its tag `pooled`.
      dtype: in which activations are computed.
    """

    vocab_size: int = 49_408
    max_length: int = 77
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_dim: int = 2048
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    causal: bool = True
    pool: Pool = "end"
    end_id: int = 49_407
    policies: tuple[Any, ...] = ()
    dtype: str = "float32"

    def build(self) -> "TextTower":
        """The module."""
        return TextTower(self)


class TextTower(nn.Module):
    """Token and position embeddings, pre-norm layers, final norm.

    `features.tokens` are the outputs after the final norm, `features.cls` is the pooled one, and
    `features.taps[k]` the residual stream after k layers (0 is the input of the first).
    """

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.token = Embed(c.vocab_size, c.width)
        table = nn.with_logical_partitioning(table_init(c.width), ("positions", "embed"))
        self.position = self.param("position", table, (c.max_length, c.width))
        block = Block(
            width=c.width,
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim,
            norm="layer",
            norm_eps=c.norm_eps,
            activation=c.activation,
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rope=None,
            rule=causal if c.causal else valid_only,
            parent=None,
        )
        self.stack = Stack(compose(layers(block, c.depth), c.policies, slots=0))
        self.final_norm = LayerNorm(c.norm_eps)

    def __call__(
        self, ids: Array, *, mask: Array | None = None, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode texts.

        Args:
          ids: int [B, T], T at most `max_length`. The position of a token is its place in the row,
            padding included.
          mask: bool [B, T], False on padding, which no token then sees; None where all are seen, as
            SigLIP has it.
          taps: depths at which to return the residual stream, 0 to `depth`.

        Raises:
          ValueError: a text that is too long, a mask of another shape, or a tap beyond the depth.
        """
        c = self.config
        if ids.ndim != 2 or ids.shape[1] > c.max_length:
            raise ValueError(f"ids: got {ids.shape}, want [B, T] with T at most {c.max_length}")
        if bad := [tap for tap in taps if not 0 <= tap <= c.depth]:
            raise ValueError(f"taps {bad}: the tower has layers 0 to {c.depth}")
        valid = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        check_shape("mask", valid, "[B, T]", *ids.shape)
        at = self.place(ids)[:, None]  # [B, 1]
        tokens = Tokens.sequence(valid, pooled=jnp.arange(ids.shape[1]) == at)
        stream = Stream(self.embed(ids), tokens)
        found, done = {}, 0
        aux: tuple[Aux, ...] = ()
        for tap in sorted({*taps, c.depth}):
            if tap > done:
                stream, _, more = self.stack(stream, start=done, stop=tap)
                aux, done = (*aux, *more), tap
            if tap in taps:
                found[tap] = stream.hidden
        hidden = self.final_norm(stream.hidden)  # [B, T, D]
        if c.policies:  # which may have moved it
            at = jnp.argmax(stream.tokens.tags["pooled"], -1, keepdims=True)
            mask = stream.tokens.valid
        pooled = take(hidden, at)[:, 0]  # [B, D]
        aux = aux if c.policies else ()
        return Features(hidden, (hidden.shape[1],), mask=mask, cls=pooled, taps=found, aux=aux)

    def embed(self, ids: Array) -> Array:
        """[B, T] int -> the input of the first layer [B, T, D]."""
        table = self.position[: ids.shape[1]]
        return (self.token(ids) + table).astype(self.config.dtype)

    def place(self, ids: Array) -> Array:
        """Where in every row of [B, T] the output stands that is pooled: int [B]."""
        c = self.config
        if c.pool == "last":
            return jnp.full(ids.shape[0], ids.shape[1] - 1)
        return jnp.argmax(ids == c.end_id if c.pool == "end" else ids, -1)


def text_table(config: TextConfig) -> Table:
    """Keys of `text_model` in Hugging Face checkpoints of CLIP and SigLIP; its layers have those of
    the vision tower.
    """
    rows = [
        Row("token/embedding", "embeddings.token_embedding.weight"),
        Row("position", "embeddings.position_embedding.weight"),
        *layer_rows(ViTConfig(depth=config.depth), "encoder.layers.{}.", CLIP_LAYER),
        *norm_rows("final_norm", "final_layer_norm"),
    ]
    return Table(tuple(rows))
