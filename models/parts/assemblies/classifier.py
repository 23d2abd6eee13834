"""Image encoders and classifiers: a tower, a pooled vector per image, and perhaps classes.

Follows: arXiv:2010.11929, and arXiv:2304.07193 for the class token beside the mean.
"""

from dataclasses import dataclass, field
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.config import ModelConfig
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Row, Table, linear
from zoo.models.core.types import Array, Batch, Features
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.towers.vit import ViTConfig

Pool = Literal["cls", "mean", "cls_mean"]
"""One vector per image: `Features.cls`, the mean of the patch tokens, or both side by side."""


@dataclass(frozen=True)
class ViTClassifierConfig(ModelConfig):
    """An image encoder, with classes or without.

    Attributes:
      tower: the vision transformer.
      pool: what stands for the image.
      pooler: a linear map and a tanh after it, of the same width.
      num_classes: outputs of the linear head; 0 for none.
    """

    tower: ViTConfig = field(default_factory=ViTConfig)
    pool: Pool = "cls"
    pooler: bool = False
    num_classes: int = 0

    def __post_init__(self) -> None:
        if self.pool not in Pool.__args__:
            raise ValueError(f"pool = {self.pool!r}: want one of {', '.join(Pool.__args__)}")
        if self.pool != "mean" and not (self.tower.class_token or self.tower.attention_pool):
            raise ValueError(f"pool = {self.pool!r}: the tower has no class token; want 'mean'")

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.tower.width * (2 if self.pool == "cls_mean" else 1)

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches."""
        return tuple(f"tower/{name}" for name in self.tower.unread)

    def build(self) -> "ViTClassifier":
        """The module."""
        return ViTClassifier(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch of images."""
        side = self.tower.image_size
        return {"pixels": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}


@struct.dataclass
class Classified:
    """What an image encoder returns.

    Attributes:
      features: of the tower.
      pooled: [..., P], one vector per image.
      logits: float32 [..., K]; None without classes.
    """

    features: Features
    pooled: Array
    logits: Array | None = None


class ViTClassifier(nn.Module):
    """Tower, pooling, and a linear head."""

    config: ViTClassifierConfig

    def setup(self) -> None:
        c, width = self.config, self.config.pooled_width
        self.tower = c.tower.build()
        if c.pooler:
            self.pooler = dense(width, width, bias=True)
        if c.num_classes:
            shape = (width, c.num_classes)
            self.head = Proj("...d,dk->...k", shape, ("embed", "classes"), bias=True)

    def __call__(
        self,
        batch: Batch,
        *,
        taps: tuple[int, ...] = (),
        qk: tuple[int, ...] = (),
        keep: Array | None = None,
    ) -> Classified:
        """Encode and, with classes, judge images.

        Args:
          batch: `pixels` [..., H, W, 3].
          taps: as of the tower.
          qk: as of the tower.
          keep: as of the tower.
        """
        features = self.tower(batch["pixels"], taps=taps, qk=qk, keep=keep)
        parts = {"cls": (features.cls,), "mean": (features.tokens.mean(-2),)}
        parts["cls_mean"] = parts["cls"] + parts["mean"]
        pooled = jnp.concatenate(parts[self.config.pool], -1)
        if self.config.pooler:
            pooled = jnp.tanh(self.pooler(pooled))
        logits = self.head(pooled).astype(jnp.float32) if self.config.num_classes else None
        return Classified(features, pooled, logits)


def head_table(config: ViTClassifierConfig, *, pooler: str = "", head: str) -> Table:
    """Rows of what follows the tower, under the keys `pooler` and `head` where they are there."""
    parts = {"pooler": (pooler, config.pooler), "head": (head, config.num_classes)}
    rows = []
    for name, (key, there) in parts.items():
        if there:
            rows.append(Row(f"{name}/kernel", f"{key}.weight", linear()))
            rows.append(Row(f"{name}/bias", f"{key}.bias"))
    return Table(tuple(rows))


def read_classes(fields: Fields) -> int:
    """The number of labels of a `config.json` of a classifier, and 0 of anything else."""
    labels = fields.take("num_labels", len(fields.take("id2label", ("0", "1"))))
    architectures = fields.take("architectures", ())
    return labels if any(name.endswith("ForImageClassification") for name in architectures) else 0
