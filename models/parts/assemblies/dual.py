"""The dual encoder: images and texts in one space. Follows: arXiv:2103.00020, arXiv:2303.15343.

CLIP compares one image with several texts (`Pairing` "softmax"); SigLIP judges every pair by itself
("sigmoid") and has a bias for that.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Row, Table, flat, linear, same
from zoo.models.core.types import Array, Aux, Batch, Features
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.text.clip import TextConfig, text_table
from zoo.models.parts.towers.vit import ViTConfig, clip_table

Pairing = Literal["softmax", "sigmoid"]
"""How logits become probabilities: among the texts of one image, or each pair by itself."""


@dataclass(frozen=True)
class DualConfig(ModelConfig):
    """A vision tower and a text tower. The defaults are CLIP, but for the towers' sizes.

    Attributes:
      vision: the vision transformer; its pooled output stands for the image.
      text: the text transformer; its pooled output stands for the text.
      embedding_dim: P, width of the shared space.
      project_image: whether a linear map takes the pooled image into the space; without one the
        width of the tower is P.
      text_bias: whether the linear map of the pooled text has a bias.
      pairing: how logits become probabilities; "sigmoid" adds a learned bias to the logits.
    """

    vision: ViTConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embedding_dim: int = 512
    project_image: bool = True
    text_bias: bool = False
    pairing: Pairing = "softmax"

    def __post_init__(self) -> None:
        if not self.project_image and self.vision.width != self.embedding_dim:
            raise ValueError(
                f"embedding_dim = {self.embedding_dim}: without an image projection, want the "
                f"vision tower's width = {self.vision.width}"
            )

    def build(self) -> "DualEncoder":
        """The module."""
        return DualEncoder(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch: as many texts as images."""
        side, text = self.vision.image_size, (batch_size, self.text.max_length)
        return {
            "pixels": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
        }


@struct.dataclass
class Pairs:
    """What a dual encoder makes of images and texts.

    Attributes:
      image: float32 [B, P], of unit length.
      text: float32 [T, P], of unit length.
      logits: float32 [B, T], scaled similarities of every image with every text.
      aux: what else the model reports; losses, already weighted, have names that end with `_loss`.
    """

    image: Array
    text: Array
    logits: Array
    aux: Aux = struct.field(default_factory=dict)


class DualEncoder(nn.Module):
    """Two towers, their projections, and the scale (and bias) of the logits."""

    config: DualConfig

    def setup(self) -> None:
        c = self.config
        self.vision, self.text = c.vision.build(), c.text.build()
        axes = ("embed", "mlp")
        if c.project_image:
            shape = (c.vision.width, c.embedding_dim)
            self.image_projection = Proj("...d,dp->...p", shape, axes)
        shape = (c.text.width, c.embedding_dim)
        self.text_projection = Proj("...d,dp->...p", shape, axes, bias=c.text_bias)
        scale, bias = (math.log(10), -10.0) if c.pairing == "sigmoid" else (math.log(1 / 0.07), 0.0)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(scale), ())
        if c.pairing == "sigmoid":
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(bias), ())

    def __call__(self, batch: Batch) -> Pairs:
        """Compare every image with every text.

        Args:
          batch: `pixels` [B, H, W, 3], `ids` [T, L] and, where padding is not to be seen,
            `text_mask` [T, L]. B and T may differ.
        """
        image = self.encode_image(batch["pixels"])
        text = self.encode_text(batch["ids"], batch.get("text_mask"))
        return Pairs(image, text, self.compare(image, text))

    def encode_image(self, pixels: Array) -> Array:
        """Images [..., H, W, 3] to float32 embeddings of unit length [..., P]."""
        return self.image_of(self.vision(pixels))

    def encode_text(self, ids: Array, mask: Array | None = None) -> Array:
        """Texts [T, L] to float32 embeddings of unit length [T, P]. `mask` as in `TextTower`."""
        return self.text_of(self.text(ids, mask=mask))

    def image_of(self, features: Features) -> Array:
        """What the vision tower has made of images, as embeddings."""
        pooled = features.cls
        return _unit(self.image_projection(pooled) if self.config.project_image else pooled)

    def text_of(self, features: Features) -> Array:
        """What the text tower has made of texts, as embeddings."""
        return _unit(self.text_projection(features.cls))

    def compare(self, image: Array, text: Array) -> Array:
        """Logits [B, T] of embeddings [B, P] and [T, P]."""
        logits = jnp.exp(self.logit_scale.astype(jnp.float32)) * (image @ text.T)
        return logits + self.logit_bias if self.config.pairing == "sigmoid" else logits

    def probabilities(self, image: Array, text: Array) -> Array:
        """What `pairing` makes of the logits: float32 [B, T]."""
        logits = self.compare(image, text)
        return jax.nn.sigmoid(logits) if self.config.pairing == "sigmoid" else nn.softmax(logits)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def dual_table(config: DualConfig) -> Table:
    """Keys of Hugging Face checkpoints of CLIP and SigLIP. In SigLIP's, the map of the pooled text
    is a part of the text tower, and scale and bias are vectors of length 1.
    """
    sigmoid = config.pairing == "sigmoid"
    head = "text_model.head" if config.text_bias else "text_projection"
    rows = [
        Row("logit_scale", "logit_scale", flat if sigmoid else same),
        Row("text_projection/kernel", f"{head}.weight", linear()),
    ]
    if config.text_bias:
        rows.append(Row("text_projection/bias", f"{head}.bias"))
    if config.project_image:
        rows.append(Row("image_projection/kernel", "visual_projection.weight", linear()))
    if sigmoid:
        rows.append(Row("logit_bias", "logit_bias", flat))
    vision = clip_table(config.vision).under("vision", "vision_model.")
    return vision + text_table(config.text).under("text", "text_model.") + Table(tuple(rows))
