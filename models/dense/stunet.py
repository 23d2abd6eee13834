"""STU-Net: residual U-Nets for volumes, which grow in depth and width together.

Six levels of resolution; the way up repeats voxels and mixes channels, so that trained weights do
not depend on strides. Every level of the way up has a segmentation head of its own.

Follows: arXiv:2304.06716.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.card import Card
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import AnyRow, Table, conv, norm_rows, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.tree import flatten_dict, unflatten_dict
from zoo.models.core.types import Array, Batch
from zoo.models.parts.layers.conv import Conv
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.norms import InstanceNorm

CARD = Card(
    slug="stunet",
    paper="arXiv:2304.06716",
    code="https://github.com/Ziyan-Huang/STU-Net",
    differs=(
        "Sides of volumes are multiples of the strides, with two voxels or more at the bottom: the "
        "official code fails later, or norms single voxels to zero.",
    ),
)

SLOPE = 0.01
"""Of the leaky ReLU below zero."""

Strides = tuple[int, int, int]


@dataclass(frozen=True)
class STUNetConfig(ModelConfig):
    """Sizes of the network. The defaults are STU-Net-S with the 104 classes that it was trained on
    and the background.

    Attributes:
      widths: channels of each level, the finest first.
      depth: residual blocks of each stage; one number for each level, or one for all. A stage on
        the way up has as many as that of its level on the way down.
      strides: of each level but the first, for depth, height and width.
      channels: of the volumes.
      num_classes: outputs of each head, with the background.
      sides: of the volumes that `inputs` describes.
      dtype: in which activations are computed.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 256, 256)
    depth: int | tuple[int, ...] = 1
    strides: tuple[Strides, ...] = ((2, 2, 2),) * 5
    channels: int = 1
    num_classes: int = 105
    sides: Strides = (128, 128, 128)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.widths) - 1 or len(self.widths) < 2:
            raise ValueError(
                f"widths = {self.widths} and strides = {self.strides}: want two levels or more, "
                "and a stride for each but the first"
            )
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depth = {self.depth}: want one number for each of {self.widths}")
        if min(self.depths) < 1 or self.num_classes < 1 or self.channels < 1:
            raise ValueError(
                f"depth = {self.depth}, num_classes = {self.num_classes}, channels = "
                f"{self.channels}: want 1 or more of each"
            )
        self.check(self.sides)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of the stages of each level."""
        return (self.depth,) * len(self.widths) if isinstance(self.depth, int) else self.depth

    @property
    def multiple(self) -> Strides:
        """What the sides of volumes are multiples of."""
        return tuple(int(step) for step in np.prod(self.strides, 0))

    def check(self, sides: tuple[int, ...]) -> None:
        """Raise a ValueError unless volumes of these sides fit."""
        smallest = [side // step for side, step in zip(sides, self.multiple, strict=True)]
        if any(side % step for side, step in zip(sides, self.multiple, strict=True)):
            raise ValueError(f"sides {tuple(sides)}: want multiples of {self.multiple}")
        if np.prod(smallest) < 2:
            raise ValueError(
                f"sides {tuple(sides)}: one voxel is left at the lowest level, which its norm "
                f"makes zero; want more than {self.multiple}"
            )

    def build(self) -> "STUNet":
        """The module."""
        return STUNet(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch of volumes."""
        shape = (batch_size, *self.sides, self.channels)
        return {"pixels": jax.ShapeDtypeStruct(shape, jnp.float32)}


@struct.dataclass
class SegmentedVolume:
    """What the network returns.

    Attributes:
      logits: float32 [B, D, H, W, K].
      coarse: logits of the lower levels, the finest first, for deep supervision.
      pyramid: outputs of the stages on the way down, the finest first.
    """

    logits: Array
    coarse: tuple[Array, ...]
    pyramid: tuple[Array, ...]


class ResidualBlock(nn.Module):
    """Two convolutions, each with an instance norm, and a shortcut: [B, D, H, W, C] -> [B, D / s,
    H / s, W / s, features].

    Attributes:
      features: channels that come out.
      stride: of the first convolution and the shortcut.
      project: whether the shortcut is a convolution.
    """

    features: int
    stride: Strides = (1, 1, 1)
    project: bool = False

    def setup(self) -> None:
        self.conv1 = Conv(self.features, (3, 3, 3), self.stride)
        self.norm1 = InstanceNorm()
        self.conv2 = Conv(self.features, (3, 3, 3))
        self.norm2 = InstanceNorm()
        if self.project:
            self.shortcut = Conv(self.features, (1, 1, 1), self.stride)

    def __call__(self, x: Array) -> Array:
        y = self.norm2(self.conv2(nn.leaky_relu(self.norm1(self.conv1(x)), SLOPE)))
        return nn.leaky_relu(y + (self.shortcut(x) if self.project else x), SLOPE)


class Stage(nn.Module):
    """Residual blocks, of which the first may change resolution and channels."""

    features: int
    depth: int
    stride: Strides = (1, 1, 1)

    def setup(self) -> None:
        first = ResidualBlock(self.features, self.stride, project=True)
        self.blocks = [first, *(ResidualBlock(self.features) for _ in range(self.depth - 1))]

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return x


class STUNet(nn.Module):
    """Stages down, stages up with skips, and a head on each of the latter."""

    config: STUNetConfig

    def setup(self) -> None:
        c = self.config
        steps = ((1, 1, 1), *c.strides)
        sizes = tuple(zip(c.widths, c.depths, strict=True))
        self.down = [Stage(*size, step) for size, step in zip(sizes, steps, strict=True)]
        above = c.widths[-2::-1]
        self.mix = [Conv(width, (1, 1, 1)) for width in above]
        self.up = [Stage(*size) for size in sizes[-2::-1]]
        self.heads = [Conv(c.num_classes, (1, 1, 1)) for _ in above]

    def __call__(self, batch: Batch) -> SegmentedVolume:
        """Segment volumes.

        Args:
          batch: `pixels` [B, D, H, W, C], normalised; sides are multiples of `multiple`.

        Raises:
          ValueError: a volume that does not fit.
        """
        c, x = self.config, batch["pixels"]
        if x.ndim != 5:
            raise ValueError(f"pixels: got {x.shape}, want [B, depth, height, width, {c.channels}]")
        check_pixels(x, channels=c.channels)
        c.check(x.shape[1:4])
        x = x.astype(c.dtype)
        pyramid = []
        for stage in self.down:
            x = stage(x)
            pyramid.append(x)
        found = []
        levels = zip(self.mix, self.up, self.heads, c.strides[::-1], pyramid[-2::-1], strict=True)
        for mix, stage, head, stride, skip in levels:
            x = stage(jnp.concatenate([self.enlarge(mix, x, stride), skip], -1))
            found.append(head(x).astype(jnp.float32))
        return SegmentedVolume(found[-1], tuple(found[-2::-1]), tuple(pyramid))

    def enlarge(self, mix: Conv, x: Array, stride: Strides) -> Array:
        """Every voxel repeated along each axis; the convolution of single voxels comes first, where
        there are fewer of them, which is the same.
        """
        x = mix(x)
        for axis, times in enumerate(stride, 1):
            x = jnp.repeat(x, times, axis)
        return x


def for_task(
    config: STUNetConfig, params: Mapping[str, Any], fresh: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters for another task: all but the heads are those that were trained.

    With more input channels the kernels of the first block, which were trained on one channel, are
    repeated for each, and not divided.

    Args:
      config: of the new model.
      params: those that were trained, not boxed.
      fresh: parameters of the new model, whose heads stay.

    Raises:
      UsageError: the two differ in more than channels and classes.
    """
    old, made = flatten_dict(params), {}
    for path, leaf in flatten_dict(fresh).items():
        if path[0].startswith("heads_"):
            made[path] = leaf
            continue
        given = old.get(path)
        first = path[0] == "down_0" and path[1] == "blocks_0"
        reads = first and path[2] in ("conv1", "shortcut") and path[3] == "kernel"
        if reads and given is not None and given.shape[-2] == 1:
            given = np.repeat(np.asarray(given), config.channels, -2)
        if given is None or given.shape != leaf.shape:
            raise UsageError(
                f"{'/'.join(path)}: want {leaf.shape}, the trained model has "
                f"{None if given is None else given.shape}; want equal widths and depths"
            )
        made[path] = given
    return unflatten_dict(made)


def supervision_weights(levels: int) -> tuple[float, ...]:
    """Weights of the losses of all outputs, the finest first: each half of the one before, the
    lowest 0, and 1 in all.
    """
    weights = np.array([0.5**level for level in range(levels)])
    if levels > 1:
        weights[-1] = 0
    return tuple(float(weight) for weight in weights / weights.sum())


def table(config: STUNetConfig) -> Table:
    """Keys of the official files, below `state_dict` or `network_weights`."""
    rows: list[AnyRow] = []

    def stage(ours: str, theirs: str, depth: int) -> None:
        for block in range(depth):
            at, key = f"{ours}/blocks_{block}", f"{theirs}.{block}"
            for number in "12":
                rows.extend(weight_rows(f"{at}/conv{number}", f"{key}.conv{number}", conv))
                rows.extend(norm_rows(f"{at}/norm{number}", f"{key}.norm{number}"))
            if block == 0:
                rows.extend(weight_rows(f"{at}/shortcut", f"{key}.conv3", conv))

    for level in range(len(config.widths)):
        stage(f"down_{level}", f"conv_blocks_context.{level}", config.depths[level])
    for level in range(len(config.widths) - 1):
        stage(f"up_{level}", f"conv_blocks_localization.{level}", config.depths[-2 - level])
        rows += weight_rows(f"mix_{level}", f"upsample_layers.{level}.conv", conv)
        rows += weight_rows(f"heads_{level}", f"seg_outputs.{level}", conv)
    return Table(tuple(rows))


def padded(strides: tuple[Strides, ...], levels: int = 6) -> tuple[Strides, ...]:
    """Strides of a plan of nnU-Net for a network of so many levels: the first ones, and (1, 1, 1)
    where there are fewer.
    """
    steps = [*strides[: levels - 1], *((1, 1, 1),) * (levels - 1 - len(strides))]
    return tuple(steps)


VARIANTS = {
    "stunet_s": STUNetConfig(),
    "stunet_b": STUNetConfig((32, 64, 128, 256, 512, 512)),
    "stunet_l": STUNetConfig((64, 128, 256, 512, 1024, 1024), depth=2),
    "stunet_h": STUNetConfig((96, 192, 384, 768, 1536, 1536), depth=3),
    "stunet_tiny": STUNetConfig(
        (4, 6, 8), depth=2, strides=((1, 2, 2), (2, 2, 2)), num_classes=3, sides=(4, 8, 8)
    ),
}


register(CARD, VARIANTS, table=table)
