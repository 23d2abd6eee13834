"""ResNet with bottlenecks, whose 3 x 3 convolutions have the strides (v1.5).

Follows: arXiv:1512.03385; blurred strides arXiv:1904.11486.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.keytable import AnyRow, Constant, Table, conv, norm_rows, weight_rows
from zoo.models.core.types import Array, Features
from zoo.models.parts.layers.conv import ConvNormAct
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import pyramid_features

EXPANSION = 4
"""Channels that a block puts out, in channels of its 3 x 3 convolution."""


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet. The defaults are ResNet-50.

    The first stage has a quarter of the image's resolution, every other one half of that before.

    Attributes:
      image_size: side in pixels of the images that it is made for; it takes others as well.
      depths: blocks of each stage.
      widths: channels of each stage, multiples of 4.
      stem_width: channels of the first convolution.
      blurpool: what a strided convolution of the stages takes in is blurred by 3 x 3 pixels first.
      norm_eps: epsilon of the batch norms.
      dtype: in which activations are computed.
    """

    image_size: int = 224
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_width: int = 64
    blurpool: bool = False
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"depths = {self.depths} and widths = {self.widths}: want one of each per stage"
            )
        if any(width % EXPANSION for width in self.widths):
            raise ValueError(f"widths = {self.widths}: want multiples of {EXPANSION}")

    @property
    def stride(self) -> int:
        """Pixels per side of what one token stands for."""
        return 2 ** (1 + len(self.depths))

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of an image of `image_size`."""
        return (-(-self.image_size // self.stride),) * 2

    def build(self) -> "ResNet":
        """The module."""
        return ResNet(self)


def blur(x: Array) -> Array:
    """Every channel of [B, H, W, C] filtered by 1, 2, 1 over 4 along both axes, zeros outside."""
    for axis in (1, 2):
        length = x.shape[axis]
        padded = jnp.pad(x, [(int(a == axis),) * 2 for a in range(4)])
        left, middle, right = (
            jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(3)
        )
        x = (left + 2 * middle + right) / 4
    return x


class ResNetBlock(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, and a shortcut, which is a convolution where shapes change."""

    config: ResNetConfig
    width: int
    stride: int = 1
    shortcut: bool = False

    def setup(self) -> None:
        inner, eps = self.width // EXPANSION, self.config.norm_eps
        self.reduce = ConvNormAct(inner, 1, norm_eps=eps)
        self.spatial = ConvNormAct(inner, 3, self.stride, norm_eps=eps)
        self.expand = ConvNormAct(self.width, 1, norm_eps=eps, activation=None)
        if self.shortcut:
            self.change = ConvNormAct(self.width, 1, self.stride, norm_eps=eps, activation=None)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        before = blur if self.config.blurpool and self.stride > 1 else lambda y: y
        y = self.spatial(before(self.reduce(x, train=train)), train=train)
        y = self.expand(y, train=train)
        return nn.relu((self.change(before(x), train=train) if self.shortcut else x) + y)


class ResNet(nn.Module):
    """`features.pyramid` are the outputs of the stages, `features.tokens` those of the last one."""

    config: ResNetConfig

    def setup(self) -> None:
        c = self.config
        self.stem = ConvNormAct(c.stem_width, 7, 2, norm_eps=c.norm_eps)
        self.firsts = [
            ResNetBlock(c, width, 2 if number else 1, shortcut=True)
            for number, width in enumerate(c.widths)
        ]
        self.rests = [
            Repeat(ResNetBlock(c, width, parent=None), depth - 1) if depth > 1 else None
            for width, depth in zip(c.widths, c.depths, strict=True)
        ]

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, 3], normalised, of any size. Leading axes are free.
          train: whether batch statistics are those of the batch.
          taps: stages, from 1, whose outputs to return as tokens too.
        """
        check_pixels(pixels)
        lead = pixels.shape[:-3]
        x = pixels.reshape(-1, *pixels.shape[-3:]).astype(self.config.dtype)
        x = nn.max_pool(self.stem(x, train=train), (3, 3), (2, 2), ((1, 1), (1, 1)))
        pyramid = []
        for first, rest in zip(self.firsts, self.rests, strict=True):
            x = first(x, train=train)
            x = x if rest is None else rest(x, train=train)
            pyramid.append(x.reshape(*lead, *x.shape[1:]))
        return pyramid_features(tuple(pyramid), taps)


def resnet_table(config: ResNetConfig) -> Table:
    """Keys of torchvision's and timm's checkpoints, without those of the head. With blurred strides
    they are those of FFCV's recipe, where the filters are constants beside the convolutions.
    """

    def unit(path: str, key: str, norm: str, steps: tuple[int, ...] | None = None) -> list[AnyRow]:
        rows = weight_rows(f"{path}/conv", key, conv, steps=steps, bias=False)
        return [*rows, *norm_rows(f"{path}/norm", norm, steps=steps, stats=True)]

    def block(path: str, key: str, blurred: str = "", **options: tuple[int, ...]) -> list[AnyRow]:
        rows: list[AnyRow] = []
        for number, name in enumerate(("reduce", "spatial", "expand"), 1):
            theirs = f"{key}.conv{number}" + (blurred if name == "spatial" else "")
            rows += unit(f"{path}/{name}", theirs, f"{key}.bn{number}", **options)
        return rows

    rows, entering = unit("stem", "conv1", "bn1"), config.stem_width
    for number, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        key, path = f"layer{number + 1}", f"firsts_{number}"
        blurred = ".conv" if config.blurpool and number else ""
        rows += block(path, f"{key}.0", blurred)
        rows += unit(f"{path}/change", f"{key}.0.downsample.0{blurred}", f"{key}.0.downsample.1")
        if blurred:
            rows.append(_filter(f"{key}.0.conv2", width // EXPANSION))
            rows.append(_filter(f"{key}.0.downsample.0", entering))
        if depth > 1:
            steps = tuple(range(1, depth))
            rows += block(f"rests_{number}/layers", f"{key}.{{}}", steps=steps)
        entering = width
    return Table(tuple(rows))


def _filter(key: str, channels: int) -> Constant:
    line = np.array([1, 2, 1], np.float32) / 4
    kernel = np.broadcast_to(np.outer(line, line), (channels, 1, 3, 3))
    return Constant(f"{key}.blur_filter", lambda: kernel)
