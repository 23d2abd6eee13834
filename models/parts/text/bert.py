"""BERT: a post-norm encoder of texts that may also read a context. Follows: arXiv:1810.04805.

Models that split BERT into a half for the text and one that fuses it with an image (ALBEF and its
kin) give the layers of the second half cross-attention and run the halves one by one:

    text = bert.encode(bert.embed(ids), mask, stop=6)
    fused = bert.encode(text.tokens, mask, start=6, context=image)
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Alias, AnyRow, Row, Table, flat, linear
from zoo.models.core.tree import check_shape
from zoo.models.core.types import Array, Batch, Features, Stream, Tokens
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import causal, valid_only
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.cross_block import CrossBlock
from zoo.models.parts.layers.embed import Embed
from zoo.models.parts.layers.linear import Proj, dense, table_init
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.stack import Stack

B = TypeVar("B", bound=Block)


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Sizes and heads of a BERT. The defaults are bert-base-uncased as it was pre-trained.

    Attributes:
      vocab_size: V.
      max_length: rows of the position table.
      num_types: rows of the token type table.
      width: D.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      activation: of the MLP and of the language model head.
      norm_eps: epsilon of the LayerNorms.
      causal: a token sees only those that do not come after it (a decoder).
      cross_layers: which layers have cross-attention, counted from 0.
      context_width: width of what they read.
      padding_id: None: the position of a token is its place in the row. An id: positions count from
        `padding_id + 1`, and this id, wherever it stands, has position `padding_id` (RoBERTa).
      pooler: whether there is a pooler, a layer over the first token.
      lm_head: whether there is a language model head, tied to the token table.
      match_head: whether there is a head of two classes over the pooler, which tells whether the
        second sentence follows the first.
      text_tokens: text length that `inputs` describes, if texts may be so long.
      dtype: in which activations are computed.
    """

    vocab_size: int = 30_522
    max_length: int = 512
    num_types: int = 2
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    causal: bool = False
    cross_layers: tuple[int, ...] = ()
    context_width: int = 768
    padding_id: int | None = None
    pooler: bool = True
    lm_head: bool = True
    match_head: bool = True
    text_tokens: int = 64
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if bad := [layer for layer in self.cross_layers if not 0 <= layer < self.depth]:
            raise ValueError(f"cross_layers {bad}: want layers 0 to {self.depth - 1}")
        if self.match_head and not self.pooler:
            raise ValueError("match_head = True reads the pooler: want pooler = True")

    @property
    def longest(self) -> int:
        """How many tokens a text may have."""
        return self.max_length - (0 if self.padding_id is None else self.padding_id + 1)

    def build(self) -> "Bert":
        """The module."""
        return Bert(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch."""
        text = (batch_size, min(self.text_tokens, self.longest))
        batch = {
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
            "token_types": jax.ShapeDtypeStruct(text, jnp.int32),
        }
        if self.cross_layers:
            context = (batch_size, 2, self.context_width)
            batch["context"] = jax.ShapeDtypeStruct(context, jnp.float32)
        return batch

    def block(self, kind: type[B], **own: Any) -> B:
        """A layer in BERT's form, with fields of its own: norms after, biases, no rotations."""
        return kind(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm="layer",
            norm_eps=self.norm_eps,
            norm_place="post",
            activation=self.activation,
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rope=None,
            parent=None,
            **own,
        )

    def plan(self) -> tuple[Step, ...]:
        """The layers."""
        rule = causal if self.causal else valid_only
        plain = self.block(Block, rule=rule)
        cross = self.block(CrossBlock, rule=rule, context_width=self.context_width)
        crossed = set(self.cross_layers)
        return tuple(Step(cross if i in crossed else plain) for i in range(self.depth))


class LMHead(nn.Module):
    """A layer, an activation and a norm before the token table, and a bias after it."""

    width: int
    vocab_size: int
    activation: str
    norm_eps: float

    def setup(self) -> None:
        self.dense = dense(self.width, self.width, bias=True)
        self.norm = LayerNorm(self.norm_eps)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        self.bias = self.param("bias", zeros, (self.vocab_size,))

    def __call__(self, hidden: Array, table: Embed) -> Array:
        """[..., D] -> float32 logits [..., V]."""
        y = self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))
        return table.attend(y).astype(jnp.float32) + self.bias


class Bert(nn.Module):
    """Embeddings, post-norm layers, and the heads that the configuration asks for."""

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.token = Embed(c.vocab_size, c.width)
        axes = ("positions", "embed")
        table = nn.with_logical_partitioning(table_init(c.width), axes)
        self.position = self.param("position", table, (c.max_length, c.width))
        self.token_type = self.param("token_type", table, (c.num_types, c.width))
        self.input_norm = LayerNorm(c.norm_eps)
        self.stack = Stack(c.plan())
        if c.pooler:
            self.pooler = dense(c.width, c.width, bias=True)
        if c.lm_head:
            self.lm_head = LMHead(c.width, c.vocab_size, c.activation, c.norm_eps)
        if c.match_head:
            self.match_head = Proj("...d,dc->...c", (c.width, 2), ("embed", "classes"), bias=True)

    def __call__(self, batch: Batch) -> Features:
        """Encode texts.

        Args:
          batch: `ids` [B, T]; and as needed `text_mask` bool [B, T], False on padding;
            `token_types` int [B, T], 0 without; `context` [B, S, C] and `context_mask` bool [B, S],
            False on what is not to be read.

        Returns:
          `tokens` [B, T, D], and `cls` [B, D], the output of the pooler, if there is one.
        """
        c = self.config
        features = self.encode(
            self.embed(batch["ids"], batch.get("token_types")),
            batch.get("text_mask"),
            context=batch.get("context"),
            context_mask=batch.get("context_mask"),
        )
        if c.pooler:
            features = features.replace(cls=self.pool(features.tokens))
        if self.is_initializing():
            _ = c.lm_head and self.predict(features.tokens[:, :1])
            _ = c.match_head and self.match(features.cls)
        return features

    def embed(self, ids: Array, token_types: Array | None = None) -> Array:
        """The input of the first layer [B, T, D] of ids int [B, T] and their types (0 if None).

        Raises:
          ValueError: a text that is longer than the position table.
        """
        c = self.config
        if ids.ndim != 2 or ids.shape[1] > c.longest:
            raise ValueError(f"ids: got {ids.shape}, want [B, T] with T at most {c.longest}")
        place = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        if c.padding_id is not None:
            real = ids != c.padding_id
            place = jnp.cumsum(real, -1) * real + c.padding_id
        types = jnp.zeros_like(ids) if token_types is None else token_types
        x = self.token(ids) + self.token_type[types] + self.position[place]
        return self.input_norm(x).astype(c.dtype)

    def encode(
        self,
        hidden: Array,
        mask: Array | None = None,
        *,
        context: Array | None = None,
        context_mask: Array | None = None,
        start: int = 0,
        stop: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> Features:
        """Run the layers from `start` to before `stop`; by default all.

        Args:
          hidden: [B, T, D], from `embed` or from earlier layers.
          mask: bool [B, T], False on padding; None where there is none.
          context: [B, S, C], what cross-attention reads; None skips cross-attention.
          context_mask: bool [B, S], False on what is not to be read.
          start: first layer.
          stop: one past the last layer.
          taps: depths, `start` to `stop`, at which to return the hidden states too (k is the output
            of k layers).

        Returns:
          `tokens` [B, T, D] and `taps`; `cls` is None.
        """
        stop = self.config.depth if stop is None else stop
        if bad := [tap for tap in taps if not start <= tap <= stop]:
            raise ValueError(f"taps {bad}: this run has layers {start} to {stop}")
        valid = jnp.ones(hidden.shape[:2], bool) if mask is None else mask.astype(bool)
        check_shape("mask", valid, "[B, T]", *hidden.shape[:2])
        memory = {"context": context, "context_mask": context_mask}
        memory = {name: array for name, array in memory.items() if array is not None}
        stream, found, done = Stream(hidden, Tokens.sequence(valid)), {}, start
        for tap in sorted({*taps, stop}):
            if tap > done:
                stream, _, _ = self.stack(stream, None, memory, start=done, stop=tap)
                done = tap
            if tap in taps:
                found[tap] = stream.hidden
        return Features(stream.hidden, (hidden.shape[1],), mask=mask, taps=found)

    def pool(self, hidden: Array) -> Array:
        """The pooler's output [B, D] for the first of the tokens [B, T, D]."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def predict(self, hidden: Array) -> Array:
        """Hidden states [..., D] -> float32 logits [..., V] of the tokens in their places."""
        return self.lm_head(hidden, self.token)

    def match(self, pooled: Array) -> Array:
        """The pooler's output [B, D] -> float32 logits [B, 2]: follows, does not follow."""
        return self.match_head(pooled).astype(jnp.float32)


def lm_head_rows(transform: str, norm: str, head: str, embedding: str) -> list[AnyRow]:
    """Rows of the head that predicts masked tokens, whose last map is the table of words.

    Args:
      transform: prefix of its first linear map.
      norm: prefix of its norm.
      head: prefix of its bias and of the copies in `decoder`.
      embedding: key of the table of words.
    """
    return [
        Row("lm_head/dense/kernel", f"{transform}.weight", linear()),
        Row("lm_head/dense/bias", f"{transform}.bias"),
        Row("lm_head/norm/scale", f"{norm}.weight"),
        Row("lm_head/norm/bias", f"{norm}.bias"),
        Row("lm_head/bias", f"{head}.bias"),
        Alias(f"{head}.decoder.weight", embedding),
        Alias(f"{head}.decoder.bias", f"{head}.bias"),
    ]


def encoder_table(config: BertConfig) -> Table:
    """Keys of embeddings, layers and pooler in Hugging Face checkpoints, without their prefix."""
    rows = [
        Row("token/embedding", "embeddings.word_embeddings.weight"),
        Row("position", "embeddings.position_embeddings.weight"),
        Row("token_type", "embeddings.token_type_embeddings.weight"),
        *_norm("input_norm", "embeddings.LayerNorm"),
        *_attention("", "attention", tuple(range(config.depth))),
    ]
    if config.cross_layers:
        rows += _attention("cross_", "crossattention", tuple(sorted(config.cross_layers)))
    steps, layer, at = tuple(range(config.depth)), "encoder.layer.{}.", "stack/layers/"
    rows += [
        *_linear(f"{at}up", f"{layer}intermediate.dense", steps=steps),
        *_linear(f"{at}down", f"{layer}output.dense", steps=steps),
        *_norm(f"{at}mlp_norm", f"{layer}output.LayerNorm", steps),
    ]
    if config.pooler:
        rows += _linear("pooler", "pooler.dense")
    return Table(tuple(rows))


def _attention(ours: str, theirs: str, steps: tuple[int, ...]) -> list[Row]:
    at, layer = f"stack/layers/{ours}", f"encoder.layer.{{}}.{theirs}."
    maps = {"self.query": ("q", 1), "self.key": ("k", 1), "self.value": ("v", 1)}
    maps["output.dense"] = ("out", 2)
    norm = _norm(f"{at}norm" if ours else f"{at}attn_norm", f"{layer}output.LayerNorm", steps)
    return norm + [
        row
        for key, (name, num_in) in maps.items()
        for row in _linear(f"{at}{name}", f"{layer}{key}", num_in, steps)
    ]


def _norm(path: str, key: str, steps: tuple[int, ...] | None = None) -> list[Row]:
    return [
        Row(f"{path}/scale", f"{key}.weight", steps=steps),
        Row(f"{path}/bias", f"{key}.bias", steps=steps),
    ]


def _linear(
    path: str, key: str, num_in: int = 1, steps: tuple[int, ...] | None = None
) -> list[Row]:
    return [
        Row(f"{path}/kernel", f"{key}.weight", linear(num_in), steps),
        Row(f"{path}/bias", f"{key}.bias", flat, steps),
    ]
