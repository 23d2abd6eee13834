"""The LLaVA assembly: tower, connector, decoder. Follows: arXiv:2310.03744.

Any tower, connector and decoder policy composes here, from one typed configuration. Pictures may be
cut into tiles, whose tokens the batch's `layout` puts into reading order, with a learned newline
between rows (LLaVA-NeXT, arXiv:2408.03326): see `zoo.processors.tiling`.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Table
from zoo.models.core.types import Array, Batch, Memory, Stream, Visual
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.assemblies.splice import splice
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, Plan, decoder_table
from zoo.models.parts.layers.linear import table_init
from zoo.models.parts.towers.vit import ViTConfig, clip_table


class Connector(Protocol):
    """Configuration of a connector. Its module maps (`Features`, budget=) to a `Visual`."""

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image at most."""
        ...

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> nn.Module:
        """The module from tower width to decoder width, for a tower of this patch grid."""
        ...


class PolicyConfig(Protocol):
    """Configuration of a decoder policy: it turns the plan of a decoder into another."""

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with this policy, for at most `slots` vision tokens in the sequence."""
        ...


@dataclass(frozen=True)
class LlavaConfig(ModelConfig):
    """A vision-language model. The defaults are LLaVA-1.5 7B.

    Attributes:
      tower: the vision transformer.
      connector: from vision tokens to decoder tokens.
      decoder: the language model.
      policies: applied to the decoder's plan in this order; the first is innermost.
      vision_layer: which hidden state of the tower is read: 0 is the input of the first layer, -1
        the output of the last, before the tower's final norm, -2 of the one before. Several are
        concatenated. None is what the tower returns, after the final norm where it has one.
      keep_class: the class token is read too, before the patches; by default it is dropped.
      newline: a learned vector that a batch's `layout` may put between vision tokens; it is token
        M Q of every row.
      image_id: the placeholder id of an image.
      num_images: images or tiles per example that `inputs` describes.
      num_slots: vision tokens per example that `inputs` describes, as the layout of one image; None
        for all tokens of all images, with a newline at the end where there is one.
      text_tokens: text length that `inputs` describes.
    """

    tower: ViTConfig = field(default_factory=ViTConfig)
    connector: Any = field(default_factory=MLPConnector)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    policies: tuple[Any, ...] = ()
    vision_layer: int | tuple[int, ...] | None = -2
    keep_class: bool = False
    newline: bool = False
    image_id: int = 32_000
    num_images: int = 1
    num_slots: int | None = None
    text_tokens: int = 64

    def __post_init__(self) -> None:
        depth = self.tower.depth
        if bad := [layer for layer in self.layers if not 0 <= layer <= depth]:
            raise ValueError(
                f"vision_layer = {self.vision_layer} means hidden states {bad}: the tower has 0 to "
                f"{depth}"
            )
        if self.keep_class and (self.vision_layer is None or not self.tower.class_token):
            raise ValueError(
                "keep_class: want a tower with a class token, and hidden states of it to read"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states that are read, 0 to `tower.depth`; empty for the tower's output."""
        given = self.vision_layer
        chosen = () if given is None else (given,) if isinstance(given, int) else given
        return tuple(layer + self.tower.depth + 1 if layer < 0 else layer for layer in chosen)

    @property
    def tile_tokens(self) -> int:
        """Q: vision tokens of one image or tile, at most."""
        return self.connector.num_tokens(self.tower.grid) + self.keep_class

    @property
    def slots(self) -> int:
        """S: vision tokens of the examples that `inputs` describes."""
        return self.num_slots or self.num_images * self.tile_tokens + self.newline

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that checkpoints carry and no forward pass reads, such as the tower's last
        norm.
        """
        names = list(self.tower.unread)
        if self.layers and self.tower.final_norm:
            names += ["final_norm/scale", "final_norm/bias"]
        if self.tower.attention_pool:
            linears = [f"pool/{part}" for part in ("q", "k", "v", "out", "up", "down")]
            names += [f"{part}/{leaf}" for part in linears for leaf in ("kernel", "bias")]
            names += ["pool/query", "pool/mlp_norm/scale", "pool/mlp_norm/bias"]
        return tuple(f"tower/{name}" for name in names)

    def plan(self) -> Plan:
        """The decoder's plan with all policies applied."""
        plan = self.decoder.plan()
        for policy in self.policies:
            plan = policy.apply(plan, slots=self.slots)
        return plan

    def build(self) -> "Llava":
        """The module."""
        return Llava(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        text, side = (batch_size, self.text_tokens), self.tower.image_size
        pixels = (batch_size, self.num_images, side, side, 3)
        batch = {
            "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "labels": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
            "segments": jax.ShapeDtypeStruct(text, jnp.int32),
        }
        if self.newline or self.num_slots is not None:
            batch["sizes"] = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
            batch["layout"] = jax.ShapeDtypeStruct((batch_size, self.slots), jnp.int32)
        return batch


class Llava(LanguageModel):
    """Images through tower and connector into the placeholders of the text, then the decoder."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.tower = c.tower.build()
        vision_width = c.tower.width * max(1, len(c.layers))
        self.connector = c.connector.build(vision_width, c.decoder.width, c.tower.grid)
        self.decoder = Decoder(c.decoder, c.plan())
        if c.newline:
            vector = nn.with_logical_partitioning(table_init(c.decoder.width), ("norm",))
            self.newline = self.param("newline", vector, (c.decoder.width,))

    def encode_image(self, pixels: Array, *, budget: int | Array | None = None) -> Visual:
        """Pixels [B, M, H, W, 3] to what the connector makes of them: tokens [B, M, Q, D]."""
        taps = self.config.layers
        last = max(taps) if taps and not self.is_initializing() else None
        features = self.tower(pixels, taps=taps, stop_after=last)
        if taps:
            first = 0 if self.config.keep_class else self.config.tower.prefix
            read = [features.taps[tap][..., first:, :] for tap in taps]
            features = features.replace(tokens=jnp.concatenate(read, -1))
        visual: Visual = self.connector(features, budget=budget)
        return visual

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text with the images in their places; text alone if there are no pixels.

        Raises:
          ValueError: pixels without a `layout` for a model with a newline, which stands where the
            layout says.
        """
        visual = Visual(None)
        if "pixels" in batch:
            visual = self.encode_image(batch["pixels"], budget=budget)
            if self.config.newline and "layout" not in batch:
                raise ValueError(
                    "a batch of pixels for a model with a newline needs a layout and sizes: "
                    "zoo.processors.tiling.pack makes them"
                )
        facts = ("text_mask", "labels", "segments", "sizes", "layout", "blend")
        stream = splice(
            batch["ids"],
            self.decoder.embed(batch["ids"]),
            visual.tokens,
            image_id=self.config.image_id,
            extra=self.newline[None] if self.config.newline else None,
            **{name: batch.get(name) for name in facts},
        )
        return stream, visual.memory


def llava_table(config: LlavaConfig) -> Table:
    """Keys of tower and decoder in official LLaVA-1.5 checkpoints; connectors add theirs."""
    tower = clip_table(config.tower).under("tower", "model.vision_tower.vision_tower.vision_model.")
    return tower + decoder_table(config.decoder).under("decoder")
