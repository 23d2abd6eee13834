"""The LLaVA assembly: tower, connector, decoder. Follows: arXiv:2310.03744.

Any tower, connector and decoder policy composes here, from one typed configuration.
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
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, Plan, llama_table
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
      vision_layer: which hidden state of the tower is read, counted as Hugging Face does: -1 is the
        output of the last layer, -2 of the one before. The class token is dropped.
      image_id: the placeholder id of an image.
      num_images: images per example that `inputs` describes.
      text_tokens: text length that `inputs` describes.
    """

    tower: ViTConfig = field(default_factory=ViTConfig)
    connector: Any = field(default_factory=MLPConnector)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    policies: tuple[Any, ...] = ()
    vision_layer: int = -2
    image_id: int = 32_000
    num_images: int = 1
    text_tokens: int = 64

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that checkpoints carry and no forward pass reads: the tower's last norm."""
        return ("tower/final_norm/scale", "tower/final_norm/bias")

    def plan(self) -> Plan:
        """The decoder's plan with all policies applied."""
        plan = self.decoder.plan()
        for policy in self.policies:
            plan = policy.apply(
                plan, slots=self.num_images * self.connector.num_tokens(self.tower.grid)
            )
        return plan

    def build(self) -> "Llava":
        """The module."""
        return Llava(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        text, side = (batch_size, self.text_tokens), self.tower.image_size
        pixels = (batch_size, self.num_images, side, side, 3)
        return {
            "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "labels": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
            "segments": jax.ShapeDtypeStruct(text, jnp.int32),
        }


class Llava(LanguageModel):
    """Images through tower and connector into the placeholders of the text, then the decoder."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.tower = c.tower.build()
        self.connector = c.connector.build(c.tower.width, c.decoder.width, c.tower.grid)
        self.decoder = Decoder(c.decoder, c.plan())

    def encode_image(self, pixels: Array, *, budget: int | Array | None = None) -> Visual:
        """Pixels [B, M, H, W, 3] to what the connector makes of them: tokens [B, M, Q, D]."""
        depth = self.config.tower.depth + 1 + self.config.vision_layer
        features = self.tower(pixels.astype(self.config.decoder.dtype), taps=(depth,))
        prefix = features.taps[depth].shape[-2] - features.tokens.shape[-2]
        patches = features.taps[depth][..., prefix:, :]
        visual: Visual = self.connector(features.replace(tokens=patches), budget=budget)
        return visual

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text with the images in their places; text alone if there are no pixels."""
        visual = Visual(None)
        if "pixels" in batch:
            visual = self.encode_image(batch["pixels"], budget=budget)
        stream = splice(
            batch["ids"],
            self.decoder.embed(batch["ids"]),
            visual.tokens,
            image_id=self.config.image_id,
            text_mask=batch.get("text_mask"),
            labels=batch.get("labels"),
            segments=batch.get("segments"),
        )
        return stream, visual.memory


def llava_table(config: LlavaConfig) -> Table:
    """Keys of tower and decoder in official LLaVA-1.5 checkpoints; connectors add theirs."""
    tower = clip_table(config.tower).under("tower", "model.vision_tower.vision_tower.vision_model.")
    return tower + llama_table(config.decoder).under("decoder")
