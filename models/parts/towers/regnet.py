"""RegNet: stages of grouped bottlenecks, plain (X), with channel attention (Y) or inverted (Z).

Follows: arXiv:2003.13678; inverted bottlenecks arXiv:2103.06877.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax

from zoo.models.core.keytable import AnyRow, Table, conv, norm_rows, pointwise, weight_rows
from zoo.models.core.types import Array, Features
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.conv import ConvNormAct
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.gates import SqueezeExcite
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import pyramid_features

Steps = tuple[int, ...] | None
"""The numbers of the blocks that share rows of a key table."""


@dataclass(frozen=True)
class RegNetConfig:
    """Sizes of a RegNet. The defaults are RegNetY-400MF.

    Every stage has half the resolution of the one before; the first has a quarter of the image's.

    Attributes:
      image_size: side in pixels of the images that it is made for; it takes others as well.
      depths: blocks of each stage.
      widths: channels of each stage.
      group_widths: channels of a group of the 3 x 3 convolutions, of each stage.
      bottleneck: channels between the 1 x 1 convolutions, in channels of the stage.
      se_ratio: hidden channels of the channel attention, in channels that enter a block; 0: none.
      inverted: blocks end without an activation and have a shortcut only where shapes agree;
        activations are SiLU instead of ReLU (RegNetZ).
      stem_width: channels of the first convolution.
      head_width: channels of a 1 x 1 convolution after the last stage; 0 for none.
      norm_eps: epsilon of the batch norms.
      dtype: in which activations are computed.
    """

    image_size: int = 224
    depths: tuple[int, ...] = (1, 3, 6, 6)
    widths: tuple[int, ...] = (48, 104, 208, 440)
    group_widths: tuple[int, ...] = (8, 8, 8, 8)
    bottleneck: float = 1.0
    se_ratio: float = 0.25
    inverted: bool = False
    stem_width: int = 32
    head_width: int = 0
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.widths) == len(self.group_widths) or not self.depths:
            raise ValueError(
                f"depths = {self.depths}, widths = {self.widths} and group_widths = "
                f"{self.group_widths}: want one of each per stage"
            )
        for inner, group in zip(self.inner_widths, self.group_widths, strict=True):
            if inner % group:
                raise ValueError(f"group width {group} does not divide {inner} channels")

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Channels between the 1 x 1 convolutions, of each stage."""
        return tuple(round(width * self.bottleneck) for width in self.widths)

    @property
    def stride(self) -> int:
        """Pixels per side of what one token stands for."""
        return 2 ** (1 + len(self.depths))

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.head_width or self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of an image of `image_size`."""
        return (-(-self.image_size // self.stride),) * 2

    @property
    def activation(self) -> str:
        """Of all layers."""
        return "silu" if self.inverted else "relu"

    def build(self) -> "RegNet":
        """The module."""
        return RegNet(self)


class RegNetBlock(nn.Module):
    """1 x 1, grouped 3 x 3, channel attention, 1 x 1, and a shortcut."""

    config: RegNetConfig
    stage: int
    entering: int
    stride: int = 1

    def setup(self) -> None:
        c, act, eps = self.config, self.config.activation, self.config.norm_eps
        width, inner = c.widths[self.stage], c.inner_widths[self.stage]
        groups = inner // c.group_widths[self.stage]
        self.reduce = ConvNormAct(inner, 1, norm_eps=eps, activation=act)
        self.spatial = ConvNormAct(
            inner, 3, self.stride, groups=groups, norm_eps=eps, activation=act
        )
        if c.se_ratio:
            self.excite = SqueezeExcite(inner, round(self.entering * c.se_ratio), act)
        self.expand = ConvNormAct(width, 1, norm_eps=eps, activation=None)
        if self.changes and not c.inverted:
            self.shortcut = ConvNormAct(width, 1, self.stride, norm_eps=eps, activation=None)

    @property
    def changes(self) -> bool:
        """Whether what comes out has another shape than what goes in."""
        return self.stride != 1 or self.entering != self.config.widths[self.stage]

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        c = self.config
        y = self.spatial(self.reduce(x, train=train), train=train)
        y = self.expand(self.excite(y) if c.se_ratio else y, train=train)
        if c.inverted:
            return y if self.changes else x + y
        x = self.shortcut(x, train=train) if self.changes else x
        return ACTIVATIONS[c.activation](x + y)


class RegNet(nn.Module):
    """A strided convolution and stages of blocks, the first of which halves the resolution.

    `features.pyramid` are the outputs of the stages, `features.tokens` those of the last one, after
    the last convolution where there is one.
    """

    config: RegNetConfig

    def setup(self) -> None:
        c = self.config
        before = (c.stem_width, *c.widths)
        act, eps = c.activation, c.norm_eps
        self.stem = ConvNormAct(c.stem_width, 3, 2, norm_eps=eps, activation=act)
        self.firsts = [RegNetBlock(c, i, before[i], stride=2) for i in range(len(c.depths))]
        self.rests = [
            Repeat(RegNetBlock(c, i, width, parent=None), depth - 1) if depth > 1 else None
            for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True))
        ]
        if c.head_width:
            self.last = ConvNormAct(c.head_width, 1, norm_eps=eps, activation=act)

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
        x, pyramid = self.stem(x, train=train), []
        for first, rest in zip(self.firsts, self.rests, strict=True):
            x = first(x, train=train)
            x = x if rest is None else rest(x, train=train)
            pyramid.append(x)
        if self.config.head_width:
            x = self.last(x, train=train)

        def free(y: Array) -> Array:
            return y.reshape(*lead, *y.shape[1:])

        return pyramid_features(tuple(jax.tree.map(free, pyramid)), taps, last=free(x))


OFFICIAL = {
    "reduce": ("f.a", "f.a_bn"),
    "spatial": ("f.b", "f.b_bn"),
    "expand": ("f.c", "f.c_bn"),
    "excite": ("f.se.f_ex.0", "f.se.f_ex.2"),
    "shortcut": ("proj", "bn"),
    "last": ("head.conv", "head.bn"),
}
"""What the official code calls the parts of a block, and the last convolution: convolutions and
their norms, and both maps of the channel attention."""
TIMM = {
    "reduce": ("conv1.conv", "conv1.bn"),
    "spatial": ("conv2.conv", "conv2.bn"),
    "expand": ("conv3.conv", "conv3.bn"),
    "excite": ("se.fc1", "se.fc2"),
    "shortcut": ("downsample.conv", "downsample.bn"),
    "last": ("final_conv.conv", "final_conv.bn"),
}
"""The same in timm."""


def regnet_table(config: RegNetConfig, names: Mapping[str, tuple[str, str]] = OFFICIAL) -> Table:
    """Keys of the official checkpoints, or of timm's, without those of the classes."""

    def unit(path: str, keys: tuple[str, str], steps: Steps = None) -> list[AnyRow]:
        rows: list[AnyRow] = list(
            weight_rows(f"{path}/conv", keys[0], conv, steps=steps, bias=False)
        )
        return rows + norm_rows(f"{path}/norm", keys[1], steps=steps, stats=True)

    def block(path: str, at: str, parts: tuple[str, ...], steps: Steps = None) -> list[AnyRow]:
        rows: list[AnyRow] = []
        for part in parts:
            rows += unit(
                f"{path}/{part}", (f"{at}.{names[part][0]}", f"{at}.{names[part][1]}"), steps
            )
        if config.se_ratio:
            for part, key in zip(("reduce", "expand"), names["excite"], strict=True):
                rows += weight_rows(f"{path}/excite/{part}", f"{at}.{key}", pointwise, steps=steps)
        return rows

    rows, parts = unit("stem", ("stem.conv", "stem.bn")), ("reduce", "spatial", "expand")
    for number, depth in enumerate(config.depths):
        at = f"s{number + 1}.b"
        first = parts if config.inverted else (*parts, "shortcut")
        rows += block(f"firsts_{number}", f"{at}1", first)
        if depth > 1:
            rows += block(f"rests_{number}/layers", f"{at}{{}}", parts, tuple(range(2, depth + 1)))
    if config.head_width:
        rows += unit("last", names["last"])
    return Table(tuple(rows))
