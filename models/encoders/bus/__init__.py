"""BUS: an image-text model whose picture is summed up from below: patches that have nothing to do
with the text leave the vision transformer half way, and a small decoder condenses what it returns.

*Selection* (TSPS), behind layer t: every patch, with the text's class token beside it, gets the
probability a that it belongs to the text; the share α with the greatest a goes on, in their order.
*Abstraction* (PAD): the s patches that the class token attends to most read all selected ones. Text
and summary are fused by the second half of BERT. No gradient passes through the choice: selection
is learned from boxes of objects and their names (patch-text matching) alone.

    u = [project(v); text]     a = σ(score(gelu(middle(gelu(up(u))))))     n' = ⌊α n⌋

`zoo.train.objectives.fusion` has the five losses of pre-training.

Follows: arXiv:2307.08504, of which no code is published.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.card import Card
from zoo.models.core.config import ModelConfig
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch
from zoo.models.encoders.bus.tower import Selected, SelectiveConfig, stream_of
from zoo.models.parts.layers.attention import everything
from zoo.models.parts.layers.cross_block import CrossBlock
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.plan import layers
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.reduce.choose import gather, top
from zoo.models.parts.text.bert import BertConfig

CARD = Card(
    slug="bus",
    paper="arXiv:2307.08504",
    differs=(
        "A re-creation: what the abstract does not settle (the selector's layers, where it stands, "
        "the abstraction's queries and depth) is our choice; the paper's results are not claimed.",
        "Text and picture are fused by six layers of BERT that cross-attend, as in ALBEF; mPLUG, "
        "which the paper starts from, also has layers that attend to both at once.",
        "Soft targets have their whole weight from the first step on; in ALBEF it grows over the "
        "first epoch.",
        "Negative pairs take the summary that was made with a picture's own text.",
    ),
)


def _text(**fields: Any) -> BertConfig:
    return BertConfig(pooler=False, match_head=False, **fields)


@dataclass(frozen=True)
class BusConfig(ModelConfig):
    """The model. The defaults are a base size at 256 pixels.

    Attributes:
      tower: the vision transformer, as wide as the texts.
      text: BERT, whose first layers encode the text and whose layers with cross-attention fuse it
        with the picture.
      writer: a causal BERT that writes on, reading picture and prefix.
      summary: s, tokens of a picture that are fused, beside the class token; 0 for all selected
        ones, without abstraction.
      summary_depth: layers of the abstraction.
      embedding_dim: of the space in which pictures and texts are compared.
      text_tokens: text length that `inputs` describes.
    """

    tower: SelectiveConfig = field(default_factory=SelectiveConfig)
    text: BertConfig = field(default_factory=lambda: _text(cross_layers=tuple(range(6, 12))))
    writer: BertConfig = field(
        default_factory=lambda: _text(cross_layers=tuple(range(12)), causal=True)
    )
    summary: int = 64
    summary_depth: int = 2
    embedding_dim: int = 256
    text_tokens: int = 25

    def __post_init__(self) -> None:
        width, tower = self.text.width, self.tower
        found = {
            "tower.width": tower.width,
            "tower.text_width": tower.text_width,
            "text.context_width": self.text.context_width,
            "writer.context_width": self.writer.context_width,
        }
        if bad := {name: value for name, value in found.items() if value != width}:
            raise ValueError(f"{bad}: want the width of the texts, {width}")
        if not self.text.cross_layers or self.text.cross_layers[0] < 1:
            raise ValueError("text: want layers with cross-attention, and others before them")
        if not 0 <= self.summary <= tower.num_kept or self.summary_depth < 1:
            raise ValueError(
                f"summary = {self.summary}, summary_depth = {self.summary_depth}: want 0 to "
                f"{tower.num_kept} tokens, those that are selected, and 1 layer or more"
            )

    def build(self) -> "Bus":
        """The module."""
        return Bus(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch: as many texts as images."""
        side, text = self.tower.image_size, (batch_size, self.text_tokens)
        return {
            "pixels": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
        }


class PatchAbstraction(nn.Module):
    """A few of the selected patches, which read all of them."""

    config: BusConfig

    def setup(self) -> None:
        c = self.config
        block = c.text.block(CrossBlock, rule=everything, context_width=c.tower.width)
        self.stack = Stack(layers(block, c.summary_depth))

    def __call__(self, seen: Selected) -> Array:
        """[B, s, D], in the order of the patches."""
        best = top(seen.attention, self.config.summary)
        stream = stream_of(gather(seen.tokens, best))
        return self.stack(stream, None, {"context": seen.tokens})[0].hidden


@struct.dataclass
class Fusion:
    """What the model makes of images and their texts.

    Attributes:
      image: float32 [B, P], of unit length; `text` likewise.
      text: see `image`.
      logits: float32 [B, B], scaled similarities of every image with every text.
      fused: [B, T, D], the text that has read its image.
      match: float32 [B, 2], whether text and image do not belong together, or do.
      words: float32 [B, T, V], the words in their places.
      following: float32 [B, T, V], the word after each, written from the image.
      relevance: float32 [B, N], logits of every patch.
      index: int32 [B, n'], the selected patches.
    """

    image: Array
    text: Array
    logits: Array
    fused: Array
    match: Array
    words: Array
    following: Array
    relevance: Array
    index: Array


class Bus(nn.Module):
    """Text encoder, tower, abstraction, fusion, and a writer."""

    config: BusConfig

    def setup(self) -> None:
        c, width = self.config, self.config.text.width
        self.tower, self.text, self.writer = c.tower.build(), c.text.build(), c.writer.build()
        if c.summary:
            self.abstraction = PatchAbstraction(c)
        self.image_projection = dense(width, c.embedding_dim, bias=True)
        self.text_projection = dense(width, c.embedding_dim, bias=True)
        self.match_head = Proj("...d,dc->...c", (width, 2), ("embed", "classes"), bias=True)
        start = nn.initializers.constant(math.log(1 / 0.07))
        self.logit_scale = self.param("logit_scale", start, ())

    def __call__(self, batch: Batch) -> Fusion:
        """Everything of `pixels` [B, H, W, 3] and `ids` int [B, T], with `text_mask` bool [B, T]
        where there is padding.
        """
        ids, mask = batch["ids"], batch.get("text_mask")
        text = self.read(ids, mask)
        seen = self.see(batch["pixels"], text[:, 0])
        summary = self.summarise(seen)
        fused = self.fuse(text, mask, summary)
        image, words = self.image_of(seen.cls), self.text_of(text[:, 0])
        return Fusion(
            image=image,
            text=words,
            logits=self.compare(image, words),
            fused=fused,
            match=self.match(fused),
            words=self.predict(fused),
            following=self.write(ids, mask, summary),
            relevance=seen.relevance,
            index=seen.index,
        )

    def read(self, ids: Array, mask: Array | None = None) -> Array:
        """Texts int [B, T] as they are before the picture is read, [B, T, D]; the first token
        stands for the text. A picture without one is selected from by a prompt, or an empty text.
        """
        first = self.config.text.cross_layers[0]
        return self.text.encode(self.text.embed(ids), mask, stop=first).tokens

    def see(self, pixels: Array, text: Array) -> Selected:
        """Images [B, H, W, 3], for what stands for their texts, [B, D]."""
        return self.tower(pixels, text)

    def relevance(self, pixels: Array, ids: Array, mask: Array | None = None) -> Array:
        """The logits of every patch for texts, float32 [B, N], without what comes after."""
        return self.tower.relevance(pixels, self.read(ids, mask)[:, 0])

    def summarise(self, seen: Selected) -> Array:
        """The picture as it is fused, [B, 1 + s, D], the class token first."""
        rest = self.abstraction(seen) if self.config.summary else seen.tokens
        return jnp.concatenate([seen.cls[:, None], rest], 1)

    def fuse(self, text: Array, mask: Array | None, summary: Array) -> Array:
        """Text from `read` [B, T, D] that reads a picture [B, S, D]."""
        first = self.config.text.cross_layers[0]
        return self.text.encode(text, mask, start=first, context=summary).tokens

    def image_of(self, cls: Array) -> Array:
        """The class token of images [B, D] in the shared space, float32 [B, P]."""
        return _unit(self.image_projection(cls))

    def text_of(self, cls: Array) -> Array:
        """The class token of texts likewise."""
        return _unit(self.text_projection(cls))

    def compare(self, image: Array, text: Array) -> Array:
        """Logits [B, B'] of embeddings."""
        return jnp.exp(self.logit_scale.astype(jnp.float32)) * (image @ text.T)

    def match(self, fused: Array) -> Array:
        """Logits [B, 2] of fused texts: no, yes."""
        return self.match_head(fused[:, 0]).astype(jnp.float32)

    def predict(self, fused: Array) -> Array:
        """Logits [B, T, V] of the words in the places of fused texts."""
        return self.text.predict(fused)

    def write(
        self,
        ids: Array,
        mask: Array | None,
        context: Array,
        context_mask: Array | None = None,
    ) -> Array:
        """Logits [B, T, V] of the word after each of `ids`, by the words up to it and a context
        [B, S, D]: the summary, or this and a fused prefix behind it.
        """
        hidden = self.writer.embed(ids)
        written = self.writer.encode(hidden, mask, context=context, context_mask=context_mask)
        return self.writer.predict(written.tokens)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _tiny_text(**fields: Any) -> BertConfig:
    sizes = {"vocab_size": 40, "max_length": 12, "width": 16, "num_heads": 2, "mlp_dim": 24}
    return _text(**sizes, context_width=16, text_tokens=8, **fields)


VARIANTS = {
    # ViT-B/16, half of the patches behind its sixth layer, 64 tokens; see docs/systems/bus.md.
    "bus_base_patch16_256": BusConfig(),
    "bus_tiny": BusConfig(
        tower=SelectiveConfig(
            image_size=16,
            patch_size=4,
            width=16,
            depth=3,
            num_heads=2,
            mlp_dim=24,
            select_after=1,
            text_width=16,
        ),
        text=_tiny_text(depth=2, cross_layers=(1,)),
        writer=_tiny_text(depth=1, cross_layers=(0,), causal=True),
        summary=4,
        summary_depth=1,
        embedding_dim=8,
        text_tokens=8,
    ),
}

register(CARD, VARIANTS)
