"""Fast compound scaling: a network for s times the FLOPs whose activations grow by about √s only.

Depth, width, group width and resolution are multiplied by powers of s that favour width, because
activations, which decide the time on accelerators, grow with the square root of the FLOPs there and
linearly elsewhere. The rule makes configurations of RegNets, which are models here, and of
EfficientNets.

Follows: arXiv:2103.06877. FLOPs are multiply-adds, activations the numbers that convolutions and
linear maps put out.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.models.core.card import Card
from zoo.models.core.config import SystemConfig
from zoo.models.core.keytable import Table
from zoo.models.core.registry import register
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.towers.regnet import TIMM, RegNetConfig, regnet_table

CARD = Card(
    slug="fast_scaling",
    paper="arXiv:2103.06877",
    code="https://github.com/facebookresearch/pycls",
    differs=(
        "The resolution for tests is a number beside the network, not a part of it.",
        "RegNets are described by their stages throughout; `regnet` makes these of the generator's "
        "numbers.",
    ),
)

FAST = "d1_w8_g8_r1"
"""The paper's rule: α = 0.8 of the FLOPs go into width."""


@dataclass(frozen=True)
class Factors:
    """By how much depth, width, group width and resolution grow: d w² r² = s."""

    depth: float
    width: float
    group: float
    resolution: float


def factors(scale: float, rule: str = FAST) -> Factors:
    """The factors for `scale` times the FLOPs.

    Args:
      scale: s.
      rule: weights of d, w, g and r, such as "d1_w8_g8_r1"; letters alone, such as "dwr", weigh 1
        each. A letter that is absent weighs 0.

    Raises:
      ValueError: the rule cannot be read, or the scale is not positive.
    """
    weights = _weights(rule)
    if scale <= 0:
        raise ValueError(f"scale = {scale}: want more than 0")
    d, w, g, r = (weights.get(letter, 0.0) for letter in "dwgr")
    total = d + w + r or g / 2 or 1.0
    half = 2 * total
    return Factors(*(scale**e for e in (d / total, w / half, g / half, r / half)))


@dataclass(frozen=True)
class EfficientNetConfig:
    """Stages of an EfficientNet (arXiv:1905.11946). The defaults are B0.

    Attributes:
      image_size: side in pixels of the images.
      depths: blocks of each stage.
      widths: channels of each stage.
      expansions: inner channels of a block, in channels that enter it.
      kernels: sides of the depthwise convolutions.
      strides: of the first block of each stage.
      se_ratio: hidden channels of the channel attention, in channels that enter a block.
      stem_width: channels of the first convolution.
      head_width: channels of the last one.
    """

    image_size: int = 224
    depths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    se_ratio: float = 0.25
    stem_width: int = 32
    head_width: int = 1280


Network = RegNetConfig | EfficientNetConfig


def scaled(network: Network, scale: float, rule: str = FAST) -> Network:
    """The network for `scale` times the FLOPs, with the rounding of the official code.

    Widths become multiples of 8 and, in RegNets, of the group width; depths and resolutions are
    rounded, resolutions to multiples of 4.
    """
    f = factors(scale, rule)
    depths = tuple(max(1, round(depth * f.depth)) for depth in network.depths)
    widths = tuple(_eights(width * f.width) for width in network.widths)
    size = scaled_resolution(network.image_size, f)
    if isinstance(network, EfficientNetConfig):
        stem, head = (_eights(w * f.width) for w in (network.stem_width, network.head_width))
        return replace(
            network,
            image_size=size,
            depths=depths,
            widths=widths,
            stem_width=stem,
            head_width=head,
        )
    groups = tuple(_group(group * f.group) for group in network.group_widths)
    pairs = [fitted(w, network.bottleneck, g) for w, g in zip(widths, groups, strict=True)]
    widths, groups = (tuple(each) for each in zip(*pairs, strict=True))
    return replace(network, image_size=size, depths=depths, widths=widths, group_widths=groups)


def scaled_resolution(size: int, by: Factors) -> int:
    """A resolution, of training or of tests, times its factor."""
    return round(size * by.resolution / 4) * 4


def fitted(width: int, bottleneck: float, group: int) -> tuple[int, int]:
    """The width and group width nearest to the given ones that go together."""
    inner = int(width * bottleneck)
    group = min(group, inner)
    step = math.lcm(group, int(bottleneck)) if bottleneck > 1 else group
    inner = max(step, round(inner / step) * step)
    return int(inner / bottleneck), group


def regnet(
    slope: float, start: int, ratio: float, depth: int, group: int, **options: Any
) -> RegNetConfig:
    """The RegNet of a generator (arXiv:2003.13678): blocks' widths start + slope j, quantised to
    powers of `ratio` times `start`, in stages of equal widths.

    Args:
      slope: w_a.
      start: w_0.
      ratio: w_m.
      depth: blocks in all.
      group: group width.
      **options: further fields of `RegNetConfig`.
    """
    widths, depths = stages(slope, start, ratio, depth)
    bottleneck = options.get("bottleneck", 1.0)
    pairs = [fitted(width, bottleneck, group) for width in widths]
    return RegNetConfig(
        depths=depths,
        widths=tuple(width for width, _ in pairs),
        group_widths=tuple(each for _, each in pairs),
        **options,
    )


def stages(
    slope: float, start: int, ratio: float, depth: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and depths of the stages of a generator, before group widths are looked at."""
    found: dict[int, int] = {}
    for block in range(depth):
        power = round(math.log((start + slope * block) / start) / math.log(ratio))
        width = round(start * ratio**power / 8) * 8
        found[width] = found.get(width, 0) + 1
    return tuple(found), tuple(found.values())


@dataclass(frozen=True)
class Complexity:
    """Multiply-adds, parameters and activations of one image."""

    flops: int
    params: int
    acts: int


def complexity(network: Network, *, num_classes: int = 1000) -> Complexity:
    """Count a network by its configuration, with a linear head."""
    meter = _Meter(network.image_size)
    meter.conv(3, network.stem_width, 3, stride=2)
    count = _efficientnet if isinstance(network, EfficientNetConfig) else _regnet
    width = count(meter, network)
    if network.head_width:
        meter.conv(width, network.head_width, 1)
        width = network.head_width
    meter.side = 1
    meter.conv(width, num_classes, 1, norm=False)
    return Complexity(meter.flops, meter.params, meter.acts)


def _regnet(meter: "_Meter", c: RegNetConfig) -> int:
    width = c.stem_width
    sizes = zip(c.depths, c.widths, c.inner_widths, c.group_widths, strict=True)
    for depth, out, inner, group in sizes:
        for block in range(depth):
            stride, side = (1 if block else 2), meter.side
            if not block and not c.inverted:
                meter.conv(width, out, 1, stride=stride)
                meter.side = side
            meter.conv(width, inner, 1)
            meter.conv(inner, inner, 3, stride=stride, groups=inner // group)
            if c.se_ratio:
                meter.excite(inner, round(width * c.se_ratio))
            meter.conv(inner, out, 1)
            width = out
    return width


def _efficientnet(meter: "_Meter", c: EfficientNetConfig) -> int:
    width = c.stem_width
    sizes = zip(c.depths, c.widths, c.expansions, c.kernels, c.strides, strict=True)
    for depth, out, expansion, kernel, stride in sizes:
        for block in range(depth):
            inner = width * expansion
            if inner != width:
                meter.conv(width, inner, 1)
            meter.conv(inner, inner, kernel, stride=1 if block else stride, groups=inner)
            meter.excite(inner, int(width * c.se_ratio))
            meter.conv(inner, out, 1)
            width = out
    return width


class _Meter:
    """Adds up what layers cost at the resolution that it has arrived at."""

    def __init__(self, side: int):
        self.side, self.flops, self.params, self.acts = side, 0, 0, 0

    def conv(
        self,
        channels: int,
        features: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
    ) -> None:
        """A convolution, with a batch norm, whose work is not counted, or else a bias."""
        self.side = (self.side - 1) // stride + 1
        weights, places = kernel**2 * channels * features // groups, self.side**2
        self.flops += weights * places + (0 if norm else features)
        self.params += weights + (2 * features if norm else features)
        self.acts += features * places

    def excite(self, width: int, hidden: int) -> None:
        """Channel attention."""
        side, self.side = self.side, 1
        self.conv(width, hidden, 1, norm=False)
        self.conv(hidden, width, 1, norm=False)
        self.side = side


def _weights(rule: str) -> dict[str, float]:
    if re.fullmatch(r"[dwgr]+", rule):
        return dict.fromkeys(rule, 1.0)
    parts = [re.fullmatch(r"([dwgr])(\d+(?:\.\d+)?)", part) for part in rule.split("_")]
    if not all(parts):
        raise ValueError(f"rule = {rule!r}: want letters of dwgr, or weights such as {FAST!r}")
    return {part[1]: float(part[2]) for part in parts if part}


def _eights(width: float) -> int:
    return max(8, round(width / 8) * 8)


def _group(group: float) -> int:
    """Group widths are 1, 2, 4 or multiples of 8."""
    number = max(1, round(group))
    return number if number <= 2 else 4 if number <= 5 else round(number / 8) * 8


@dataclass(frozen=True)
class FastScalingConfig(SystemConfig):
    """A scaling rule.

    Attributes:
      rule: weights of depth, width, group width and resolution, see `factors`.
    """

    rule: str = FAST

    def __post_init__(self) -> None:
        _weights(self.rule)

    def build(self) -> "FastScaling":
        """The rule as a function of a network and a scale."""
        return FastScaling(self.rule)


@dataclass(frozen=True)
class FastScaling:
    """`(network, scale) -> network`; classifiers keep their head."""

    rule: str = field(default=FAST)

    def __call__(self, network: Any, scale: float) -> Any:
        """The configuration for `scale` times the FLOPs: of a RegNet or EfficientNet, or of a
        classifier with such a tower.
        """
        if isinstance(network, ClassifierConfig):
            return replace(network, tower=scaled(network.tower, scale, self.rule))
        return scaled(network, scale, self.rule)


_Z = {"bottleneck": 4.0, "inverted": True}

NETWORKS: dict[str, Network] = {
    "regnetx_3_2gf": regnet(26.31, 88, 2.25, 25, 48, se_ratio=0.0),
    "regnety_400mf": regnet(27.89, 48, 2.09, 16, 8),
    "regnety_4gf": regnet(31.41, 96, 2.24, 22, 64),
    "regnetz_500mf": regnet(10.7, 16, 2.51, 21, 4, head_width=1024, **_Z),
    "regnetz_4gf": regnet(14.5, 48, 2.226, 28, 8, **_Z),
    "regnetz_4gf_h": regnet(14.5, 48, 2.226, 28, 8, head_width=1536, **_Z),
    "efficientnet_b0": EfficientNetConfig(),
}
"""What the paper scales. The numbers of RegNetZ are timm's `regnetz_*`; the paper has none."""


VARIANTS: dict[str, SystemConfig] = {
    "fast_scaling": FastScalingConfig(),
    "fast_scaling.uniform": FastScalingConfig("dwr"),
    **{
        name: ClassifierConfig(network, pool="mean", num_classes=1000)
        for name, network in NETWORKS.items()
        if isinstance(network, RegNetConfig)
    },
    "fast_scaling_tiny": ClassifierConfig(
        RegNetConfig(
            image_size=32,
            depths=(1, 2),
            widths=(8, 16),
            group_widths=(4, 4),
            stem_width=8,
            bottleneck=2.0,
            inverted=True,
        ),
        pool="mean",
        num_classes=5,
    ),
}


def table(config: ClassifierConfig) -> Table:
    """Keys of the official checkpoints (`model_state` in their files)."""
    own = regnet_table(config.tower).under("tower") + head_table(config, head="head.fc")
    return own.with_stats()


def timm_table(config: ClassifierConfig) -> Table:
    """Keys of timm's RegNets."""
    own = regnet_table(config.tower, TIMM).under("tower") + head_table(config, head="head.fc")
    return own.with_stats()


register(CARD, VARIANTS, table=table)
