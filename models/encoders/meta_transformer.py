"""Meta-Transformer: one frozen encoder behind a tokenizer for each kind of data.

Pictures, videos, time series, sound, text, rows of tables, spectra, point clouds and graphs become
tokens of one width (`zoo.models.parts.layers.modalities`, `.points`); a vision transformer without
positions and final norm, pre-trained on pictures, encodes them, alone or side by side.

Follows: arXiv:2307.10802.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.card import Card
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import AnyRow, Ignored, Row, Table, conv, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Aux, Batch, Features, Memory, Stream, Tokens
from zoo.models.parts.assemblies.classifier import Classified
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.layers.modalities import (
    Audio,
    Bands,
    Modality,
    Pictures,
    Sequence,
    Series,
    Text,
    Video,
    present,
)
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.points import Points
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.towers.vit import TIMM_LAYER, ViTBlock, ViTConfig, layer_rows, ones

CARD = Card(
    slug="meta_transformer",
    paper="arXiv:2307.10802",
    code="https://github.com/invictus717/MetaTransformer",
    differs=(
        "The tokenizers of video, sound, text and spectra do what the paper says; as released they "
        "do not run.",
        "The mean of all tokens stands for mixed inputs; decoders of single tasks are not here.",
    ),
)

FROZEN = ("encoder/.*",)
"""Patterns of the parameters that most tasks leave as they are, see `zoo.train.parts.Part`."""

PLACE = "place"
"""In the memory of the layers: what is added before each, [B, N, D]."""


@dataclass(frozen=True)
class MetaTransformerConfig(ModelConfig):
    """Sizes of the encoder, and the kinds of data. The defaults are B/16 on pictures.

    Attributes:
      tokenizers: of the kinds of data that it reads, each once.
      width: D.
      depth: layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLPs.
      num_classes: outputs of a linear head on what stands for the input; 0 for none.
      dtype: in which activations are computed.
    """

    tokenizers: tuple[Modality, ...] = (Pictures(),)
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        names = [each.name for each in self.tokenizers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tokenizers of {names}: want one or more, each kind of data once")

    @property
    def encoder(self) -> ViTConfig:
        """The encoder as a vision transformer, of which only the layers are used."""
        return ViTConfig(
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation="gelu",
            norm_eps=1e-5,
        )

    def plan(self) -> tuple[Step, ...]:
        """The layers, all alike."""
        block = self.encoder.plan()[0].block
        fields = {
            name: getattr(block, name)
            for name in block.__dataclass_fields__
            if name not in ("parent", "name")
        }
        return (Step(PlacedBlock(**fields, parent=None)),) * self.depth

    def build(self) -> "MetaTransformer":
        """The module."""
        return MetaTransformer(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch with all kinds of data."""
        found: dict[str, Array] = {}
        for each in self.tokenizers:
            found |= each.inputs(batch_size)
        return found


class PlacedBlock(ViTBlock):
    """The layer of a ViT, before which `memory["place"]` is added, if it is there."""

    def __call__(self, stream: Stream, state: None, memory: Memory) -> tuple[Stream, None, Aux]:
        if PLACE in memory:
            stream = stream.replace(
                hidden=stream.hidden + memory[PLACE].astype(stream.hidden.dtype)
            )
        return super().__call__(stream, state, memory)


class MetaTransformer(nn.Module):
    """Tokenizers, the encoder, perhaps a head.

    `pooled` is the mean of all tokens; of point clouds alone, the class token and the maximum over
    all others side by side, after a norm.
    """

    config: MetaTransformerConfig

    def setup(self) -> None:
        c = self.config
        self.tokenizers = {each.name: each.build(c.width) for each in c.tokenizers}
        self.encoder = Stack(c.plan())
        if self.of_points:
            self.point_norm = LayerNorm(1e-6)
        if c.num_classes:
            shape = (c.width * (2 if self.of_points else 1), c.num_classes)
            self.head = Proj("...d,dk->...k", shape, ("embed", "classes"), bias=True)

    @property
    def of_points(self) -> bool:
        """Whether it reads point clouds and nothing else."""
        return all(isinstance(each, Points) for each in self.config.tokenizers)

    def __call__(self, batch: Batch, *, train: bool = False) -> Classified:
        """Encode data of one kind or of several, whose tokens then stand side by side.

        Args:
          batch: what the tokenizers read; kinds of data that are not there are passed over.
          train: whether tokenizers drop numbers and use statistics of the batch.

        Raises:
          UsageError: there is nothing to read.
        """
        sequence = self.tokens(batch, train=train)
        tokens = self.encode(sequence)
        if self.of_points:
            tokens = self.point_norm(tokens)
            pooled = jnp.concatenate([tokens[:, 0], tokens[:, 1:].max(1)], -1)
        else:
            pooled = tokens.mean(1)
        logits = self.head(pooled).astype(jnp.float32) if self.config.num_classes else None
        return Classified(Features(tokens, (tokens.shape[1],)), pooled, logits)

    def tokens(self, batch: Batch, *, train: bool = False) -> Sequence:
        """The tokens of all that a batch has, in the order of the tokenizers."""
        kinds = present(self.config.tokenizers, batch)
        if not kinds:
            wanted = ", or ".join(" and ".join(each.reads) for each in self.config.tokenizers)
            raise UsageError(f"a batch of {', '.join(batch) or 'nothing'}: want {wanted}")
        found = [self.tokenizers[each.name](batch, train=train) for each in kinds]
        tokens = jnp.concatenate([each.tokens.astype(self.config.dtype) for each in found], 1)
        if all(each.place is None for each in found):
            return Sequence(tokens)
        places = [jnp.zeros_like(x.tokens) if x.place is None else x.place for x in found]
        return Sequence(tokens, jnp.concatenate(places, 1))

    def encode(self, sequence: Sequence) -> Array:
        """Tokens [B, N, D] after all layers: without places their order does not matter."""
        x = sequence.tokens
        stream = Stream(x, Tokens.sequence(jnp.ones(x.shape[:2], bool)))
        memory = {} if sequence.place is None else {PLACE: sequence.place}
        return self.encoder(stream, memory=memory)[0].hidden


def encoder_table(config: MetaTransformerConfig, prefix: str = "") -> Table:
    """Keys of the official file of the encoder, which has nothing else, for `params["encoder"]`."""
    return Table(tuple(layer_rows(config.encoder, prefix + "{}.", TIMM_LAYER, stack="layers")))


def tokenizer_table(tokenizer: Modality) -> Table:
    """Keys of the official class of a tokenizer.

    Raises:
      UsageError: its numbers are not those of an official class.
    """
    if isinstance(tokenizer, Pictures):
        return Table(tuple(weight_rows("patch", "proj", conv)))
    if isinstance(tokenizer, Video):
        return Table(tuple(weight_rows("tube", "proj", conv)))
    if isinstance(tokenizer, Series):
        rows: list[AnyRow] = [Row("value/kernel", "value_embedding.tokenConv.weight", conv)]
        fixed = r"(position_embedding\.pe|temporal_embedding\..*)"  # which follow from the sizes
        return Table((*rows, Ignored(fixed)))
    if isinstance(tokenizer, Audio):
        rows = [*weight_rows("patch", "patch_embed.proj", conv)]
        return Table((*rows, Row("position", "pos_embed", ones(1))))
    if isinstance(tokenizer, Text):
        return Table((Row("embed/embedding", "token_embedding.weight"),))
    if isinstance(tokenizer, Bands):
        rows = [*weight_rows("embed", "patch_to_embedding")]
        rows += [Row("cls", "cls_token", ones(2)), Row("position", "pos_embedding", ones(1))]
        return Table(tuple(rows))
    raise UsageError(f"the tokenizer of {tokenizer.name}: no official class has its numbers")


def table(config: MetaTransformerConfig) -> Table:
    """Keys of a model: the encoder's below `encoder.`, and those of its tokenizers."""
    found = encoder_table(config, "encoder.").under("encoder")
    for each in config.tokenizers:
        only = "tokenizer." if len(config.tokenizers) == 1 else f"tokenizer.{each.name}."
        found += tokenizer_table(each).under(f"tokenizers_{each.name}", only)
    if config.num_classes:
        found += Table(tuple(weight_rows("head", "head")))
    return found


_LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}

VARIANTS = {
    "meta_transformer_b16": MetaTransformerConfig(),
    "meta_transformer_l14": MetaTransformerConfig((Pictures(patch_size=14),), **_LARGE),
    "meta_transformer_b16.series": MetaTransformerConfig((Series(),)),
    "meta_transformer_tiny": MetaTransformerConfig(
        (Pictures(image_size=8, patch_size=4), Series(channels=2, length=5)),
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=32,
        num_classes=3,
    ),
}


register(CARD, VARIANTS, table=table)
