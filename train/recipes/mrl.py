"""Matryoshka representation learning: one embedding whose first 8, 16, 32, ... features are each an
embedding, too.

Every prefix has a linear head of its own (MRL) or takes the first rows of one that all share
(MRL-E); their losses are added up (`zoo.train.objectives.nested`). Prefixes then serve as cheaper
embeddings: for adaptive retrieval and the funnel see `zoo.evaluate.retrieval`, for the cascade of
classifiers `cascade`.

Follows: arXiv:2205.13147.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.evaluate.retrieval import Stage
from zoo.models.base.timm_vit import tower_table
from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import Row, Table, linear, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch
from zoo.models.parts.assemblies.classifier import Classified, Classifier, ClassifierConfig
from zoo.models.parts.layers.linear import Proj, contract, fan_in_init
from zoo.models.parts.towers.resnet import ResNetConfig, resnet_table
from zoo.models.parts.towers.vit import ViTConfig

CARD = Card(
    slug="mrl",
    paper="arXiv:2205.13147",
    code="https://github.com/RAIVNLab/MRL",
    differs=(
        "The shared head adds up the products of the pieces between the prefixes: the numbers of "
        "one product per prefix, for the price of one.",
        "Any tower can stand before the head.",
    ),
)

FUNNEL = tuple(
    Stage(size, keep)
    for size, keep in ((8, 200), (16, 100), (32, 50), (64, 25), (128, 10), (2048, 10))
)
"""The funnel of the paper for embeddings of 2,048 features."""


@dataclass(frozen=True)
class Matryoshka:
    """The nested head.

    Attributes:
      sizes: lengths of the prefixes, growing.
      efficient: whether all prefixes share one linear map (MRL-E).
      bias: whether heads have biases.
    """

    sizes: tuple[int, ...] = tuple(2**power for power in range(3, 12))
    efficient: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes = {self.sizes}: want growing lengths of 1 or more")

    def build(self, width: int, num_classes: int) -> "NestedHead":
        """The module for embeddings of `width`.

        Raises:
          ValueError: a prefix is longer than the embedding.
        """
        if self.sizes[-1] > width:
            raise ValueError(f"sizes = {self.sizes}: the embedding has {width} features")
        return NestedHead(self, num_classes)


class NestedHead(nn.Module):
    """Logits of every prefix: [..., D] -> [..., G, K]."""

    config: Matryoshka
    num_classes: int

    def setup(self) -> None:
        c, axes = self.config, ("embed", "classes")
        if not c.efficient:
            self.heads = [
                Proj("...d,dk->...k", (size, self.num_classes), axes, bias=c.bias)
                for size in c.sizes
            ]
            return
        init = nn.with_logical_partitioning(fan_in_init((0,), (1,)), axes)
        self.kernel = self.param("kernel", init, (c.sizes[-1], self.num_classes))
        if c.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("classes",))
            self.bias = self.param("bias", zeros, (self.num_classes,))

    def __call__(self, x: Array) -> Array:
        c = self.config
        if not c.efficient:
            found = [head(x[..., :size]) for head, size in zip(self.heads, c.sizes, strict=True)]
            return jnp.stack(found, -2)
        ends = (0, *c.sizes)
        pieces = [
            contract("...d,dk->...k", x[..., a:b], self.kernel[a:b]) for a, b in pairwise(ends)
        ]
        logits = jnp.cumsum(jnp.stack(pieces, -2), -2)
        return logits + self.bias.astype(logits.dtype) if c.bias else logits


@dataclass(frozen=True)
class MRLConfig(ClassifierConfig):
    """A classifier with a nested head.

    Attributes:
      head: the head; its longest prefix is at most as long as the pooled vector.
    """

    head: Matryoshka = field(default_factory=Matryoshka)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes}: want 1 or more for nested heads")
        self.head.build(self.pooled_width, self.num_classes)

    def build(self) -> "MRL":
        """The module."""
        return MRL(self)


@struct.dataclass
class Nested(Classified):
    """What a classifier with a nested head returns: `logits` are those of the longest prefix.

    Attributes:
      nested: float32 [..., G, K], logits of all prefixes, the shortest first.
      sizes: their lengths, static.
    """

    nested: Array | None = None
    sizes: tuple[int, ...] = struct.field(pytree_node=False, default=())


class MRL(Classifier):
    """A tower with a nested head."""

    config: MRLConfig

    def setup_head(self) -> None:
        self.head = self.config.head.build(self.config.pooled_width, self.config.num_classes)

    def __call__(self, batch: Batch, *, train: bool = False, **asked: Any) -> Nested:
        """Encode and judge images; arguments are those of `Classifier`."""
        out = super().__call__(batch, train=train, **asked)
        nested, sizes = out.logits, self.config.head.sizes
        return Nested(out.features, out.pooled, nested[..., -1, :], nested, sizes)


@dataclass(frozen=True)
class Cascade:
    """What a cascade of classifiers decided.

    Attributes:
      classes: int [N], the answers.
      stage: int [N], the number of the prefix that answered.
      mean_size: features that an answer took on average.
    """

    classes: np.ndarray
    stage: np.ndarray
    mean_size: float


def cascade(logits: np.ndarray, sizes: Sequence[int], thresholds: Sequence[float]) -> Cascade:
    """Adaptive classification: the shortest prefix that is sure enough answers.

    Args:
      logits: [N, G, K] of all prefixes.
      sizes: lengths of the G prefixes.
      thresholds: G - 1 probabilities; a prefix answers where its largest one is above its
        threshold, and the longest answers what is left. `cascade_thresholds` learns them.

    Raises:
      UsageError: not one threshold for every prefix but the longest.
    """
    if len(thresholds) != logits.shape[1] - 1 or len(sizes) != logits.shape[1]:
        raise UsageError(f"{len(thresholds)} thresholds: want one less than {logits.shape[1]}")
    sure = _confidence(logits)[:, :-1] > np.asarray(thresholds)
    last = logits.shape[1] - 1
    stage = np.where(sure.any(1), sure.argmax(1), last)
    classes = np.take_along_axis(logits, stage[:, None, None], 1)[:, 0].argmax(-1)
    return Cascade(classes, stage, float(np.asarray(sizes)[stage].mean()))


def cascade_thresholds(
    logits: np.ndarray, classes: np.ndarray, *, grid: int = 100
) -> tuple[float, ...]:
    """Thresholds from a hold-out: for every prefix the smallest of `grid` probabilities above which
    it is right at least as often as the longest prefix on the same images; 1, never, if there is
    none.

    Args:
      logits: [N, G, K].
      classes: [N].
      grid: how many are tried.
    """
    confidence, right = _confidence(logits), logits.argmax(-1) == classes[:, None]
    found = []
    for number in range(logits.shape[1] - 1):
        tried = np.linspace(0, 1, grid, endpoint=False)
        kept = [confidence[:, number] > t for t in tried]
        good = [
            t
            for t, k in zip(tried, kept, strict=True)
            if k.any() and right[k, number].mean() >= right[k, -1].mean()
        ]
        found.append(float(good[0]) if good else 1.0)
    return tuple(found)


def _confidence(logits: np.ndarray) -> np.ndarray:
    """[N, G], the largest probability of each prefix."""
    shifted = logits - logits.max(-1, keepdims=True)
    return 1 / np.exp(shifted).sum(-1)


def head_table(config: Matryoshka) -> Table:
    """Keys of the official head: one map per prefix, or the first one alone."""
    if config.efficient:
        rows = [Row("kernel", "nesting_classifier_0.weight", linear())]
        rows += [Row("bias", "nesting_classifier_0.bias")] * config.bias
    else:
        rows = [
            row
            for number in range(len(config.sizes))
            for row in weight_rows(
                f"heads_{number}", f"nesting_classifier_{number}", bias=config.bias
            )
        ]
    return Table(tuple(rows))


_DIGITS = ViTConfig(
    image_size=8,
    patch_size=2,
    width=64,
    depth=3,
    num_heads=4,
    mlp_dim=128,
    activation="gelu",
    class_token=False,
    input_norm=False,
)


def _resnet(*, efficient: bool) -> MRLConfig:
    """ResNet-50 with blurred strides, evaluated at 256 pixels."""
    tower = ResNetConfig(image_size=256, blurpool=True)
    return MRLConfig(tower, pool="mean", num_classes=1000, head=Matryoshka(efficient=efficient))


VARIANTS = {
    "mrl_resnet50": _resnet(efficient=False),
    "mrl_resnet50.efficient": _resnet(efficient=True),
    # Ours, for scans of 8 x 8 pixels: trains on two CPU cores in minutes.
    "mrl_digits": MRLConfig(
        _DIGITS, pool="mean", num_classes=10, head=Matryoshka((2, 4, 8, 16, 32, 64))
    ),
    "mrl_digits.efficient": MRLConfig(
        _DIGITS, pool="mean", num_classes=10, head=Matryoshka((2, 4, 8, 16, 32, 64), efficient=True)
    ),
    "mrl_tiny": MRLConfig(
        ViTConfig(
            image_size=8,
            patch_size=4,
            width=16,
            depth=1,
            num_heads=2,
            mlp_dim=32,
            class_token=False,
            input_norm=False,
        ),
        pool="mean",
        num_classes=5,
        head=Matryoshka((2, 4, 8, 16)),
    ),
}


def table(config: MRLConfig) -> Table:
    """Keys of the official ResNet-50, as distributed training saves them; towers that are vision
    transformers have timm's.
    """
    head = head_table(config.head)
    if isinstance(config.tower, ViTConfig):
        return tower_table(config.tower).under("tower") + head.under("head", "head.")
    tower = resnet_table(config.tower).under("tower", "module.")
    return (tower + head.under("head", "module.fc.")).with_stats()


register(CARD, VARIANTS, table=table)
