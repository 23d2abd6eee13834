"""Image encoders and classifiers: a tower, a pooled vector per image, and perhaps classes.

Follows: arXiv:2010.11929, and arXiv:2304.07193 for the class token beside the mean.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.config import ModelConfig
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import AnyRow, Table, norm_rows, weight_rows
from zoo.models.core.types import Array, Batch, Features
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import NormKind, make_norm
from zoo.models.parts.towers.vit import ViTConfig

Pool = Literal["cls", "mean", "cls_mean"]
"""One vector per image: `Features.cls`, the mean of the patch tokens, or both side by side."""


class TowerConfig(Protocol):
    """The configuration of a tower: a frozen dataclass.

    Beside what stands here it may have `channels`, of its images, 3 by default; `class_token` and
    `attention_pool`, whether `Features.cls` is there; and `unread`, paths of parameters that no
    gradient reaches.
    """

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it is made for."""
        ...

    @property
    def width(self) -> int:
        """D of its tokens."""
        ...

    def build(self) -> nn.Module:
        """The module, `(pixels, *, train=False, taps=(), ...) -> Features`."""
        ...


@dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
    """An image encoder, with classes or without.

    Attributes:
      tower: the configuration of any tower that makes `Features` of `pixels`.
      pool: what stands for the image.
      pooler: a linear map and a tanh after it, of the same width.
      num_classes: outputs of the linear head; 0 for none.
      head_norm: a norm of the pooled vector; None for none.
      head_norm_eps: epsilon of this norm.
    """

    tower: Any = field(default_factory=ViTConfig)
    pool: Pool = "cls"
    pooler: bool = False
    num_classes: int = 0
    head_norm: NormKind | None = None
    head_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not all(hasattr(self.tower, name) for name in ("build", "image_size", "width")):
            raise ValueError(
                f"tower = {self.tower!r}: want the configuration of a tower, with `build`, "
                "`image_size` and `width`"
            )
        if self.pool not in Pool.__args__:
            raise ValueError(f"pool = {self.pool!r}: want one of {', '.join(Pool.__args__)}")
        has_cls = any(
            getattr(self.tower, name, False) for name in ("class_token", "attention_pool")
        )
        if self.pool != "mean" and not has_cls:
            raise ValueError(f"pool = {self.pool!r}: the tower has no class token; want 'mean'")

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        width: int = self.tower.width
        return width * (2 if self.pool == "cls_mean" else 1)

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches."""
        return tuple(f"tower/{name}" for name in getattr(self.tower, "unread", ()))

    def build(self) -> "Classifier":
        """The module."""
        return Classifier(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch of images."""
        return image_inputs(self.tower, batch_size)


def image_inputs(tower: TowerConfig, batch_size: int) -> Batch:
    """Shapes of a batch of images that a tower is made for."""
    shape = (batch_size, tower.image_size, tower.image_size, getattr(tower, "channels", 3))
    return {"pixels": jax.ShapeDtypeStruct(shape, jnp.float32)}


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


class Classifier(nn.Module):
    """Tower, pooling, and a linear head.

    A system whose head is more than that replaces `setup_head` and `judge`.
    """

    config: ClassifierConfig

    def setup(self) -> None:
        c, width = self.config, self.config.pooled_width
        self.tower = c.tower.build()
        if c.pooler:
            self.pooler = dense(width, width, bias=True)
        if c.head_norm is not None:
            self.head_norm = make_norm(c.head_norm, c.head_norm_eps)
        if c.num_classes:
            self.setup_head()

    def setup_head(self) -> None:
        """Hook: the parts of `judge`."""
        shape = (self.config.pooled_width, self.config.num_classes)
        self.head = Proj("...d,dk->...k", shape, ("embed", "classes"), bias=True)

    def judge(self, pooled: Array, *, train: bool) -> Array:
        """Hook: logits [..., K] of pooled vectors [..., P]."""
        del train
        return self.head(pooled)

    def __call__(
        self,
        batch: Batch,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        qk: tuple[int, ...] = (),
        keep: Array | None = None,
        **options: Any,
    ) -> Classified:
        """Encode and, with classes, judge images.

        Args:
          batch: `pixels` [..., H, W, C].
          train: whether paths are dropped and batch statistics are those of the batch.
          taps: as of the tower.
          qk: as of the tower, if it has attention whose queries and keys it can return.
          keep: as of the tower, if it can encode some of its patches only.
          **options: of the tower, what it alone has.
        """
        asked = options | ({"qk": qk} if qk else {}) | ({} if keep is None else {"keep": keep})
        features = self.tower(batch["pixels"], train=train, taps=taps, **asked)
        parts = {"cls": (features.cls,), "mean": (features.tokens.mean(-2),)}
        parts["cls_mean"] = parts["cls"] + parts["mean"]
        pooled = jnp.concatenate(parts[self.config.pool], -1)
        if self.config.pooler:
            pooled = jnp.tanh(self.pooler(pooled))
        if self.config.head_norm is not None:
            pooled = self.head_norm(pooled)
        logits = None
        if self.config.num_classes:
            logits = self.judge(pooled, train=train).astype(jnp.float32)
        return Classified(features, pooled, logits)


def head_table(
    config: ClassifierConfig, *, pooler: str = "", norm: str = "", head: str = ""
) -> Table:
    """Rows of what follows the tower, under these keys, as far as it is there."""
    parts = {"pooler": (pooler, config.pooler), "head": (head, config.num_classes)}
    rows: list[AnyRow] = [] if config.head_norm is None else norm_rows("head_norm", norm)
    for name, (key, there) in parts.items():
        if there:
            rows += weight_rows(name, key)
    return Table(tuple(rows))


def read_classes(fields: Fields) -> int:
    """The number of labels of a `config.json` of a classifier, and 0 of anything else."""
    labels = fields.take("num_labels", len(fields.take("id2label", ("0", "1"))))
    architectures = fields.take("architectures", ())
    return labels if any(name.endswith("ForImageClassification") for name in architectures) else 0
