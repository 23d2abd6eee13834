"""What DeepMAD knows of a network without training it: its entropy, its effectiveness, its cost.

A network is a line of `Unit`s. Numbers are those of the paper with both exponents (α) at 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["conv", "bottleneck", "inverted"]
"""A convolution; blocks 1 x 1, k x k, 1 x 1 in ReLUs; or the same with a depthwise filter, channel
attention and SiLUs."""

WEIGHTS = (1.0, 1.0, 1.0, 1.0, 8.0)
"""Of the entropies of the last five resolutions, or of fewer."""


@dataclass(frozen=True)
class Unit:
    """A convolution or a row of equal blocks; the first of these carries the stride.

    Attributes:
      kind: of what.
      out: channels that go out.
      kernel: side of the filters.
      stride: 1 or 2.
      depth: how many blocks.
      inner: channels within the blocks.
    """

    kind: Kind
    out: int
    kernel: int = 3
    stride: int = 1
    depth: int = 1
    inner: int = 0

    def __post_init__(self) -> None:
        if self.kind not in Kind.__args__:
            raise ValueError(f"kind = {self.kind!r}: want one of {', '.join(Kind.__args__)}")
        if self.stride not in (1, 2) or self.kernel % 2 == 0:
            raise ValueError(f"{self}: want a stride of 1 or 2 and an odd kernel")
        if min(self.out, self.depth) < 1 or (self.kind == "conv") != (self.inner == 0):
            raise ValueError(f"{self}: want channels, blocks, and inner channels of blocks only")
        if self.kind == "conv" and self.depth > 1:
            raise ValueError(f"{self}: want a convolution at a time")


Net = Sequence[Unit]


def squeezed(inner: int) -> int:
    """Channels within the channel attention of inverted blocks."""
    return max(1, round(inner * 0.25) // 8) * 8


@dataclass(frozen=True)
class Block:
    """One block, or one convolution, at its place in a network.

    Attributes:
      unit: what it is; `stride` is that of this block.
      entering: channels that come in.
      number: of the unit, from 0.
      first: whether it is the first of its unit.
    """

    unit: Unit
    entering: int
    number: int
    first: bool

    @property
    def convolutions(self) -> int:
        """How many there are on the way through."""
        return 1 if self.unit.kind == "conv" else 3

    @property
    def log_std(self) -> float:
        """The logarithm of the standard deviation that it gives to what it lets through."""
        u = self.unit
        if u.kind == "conv":
            return math.log(self.entering * u.kernel**2) / 2
        filters = u.kernel**2 * (u.inner if u.kind == "bottleneck" else 1)
        return (math.log(self.entering) + math.log(filters) + math.log(u.inner)) / 2

    @property
    def log_width(self) -> float:
        """The logarithm of the product of what its convolutions sum over."""
        return 2 * self.log_std

    @property
    def projects(self) -> bool:
        """Whether the shortcut has a convolution."""
        changes = self.entering != self.unit.out
        return self.unit.kind == "bottleneck" and (self.first or changes)

    @property
    def skips(self) -> bool:
        """Whether there is a shortcut."""
        same = self.entering == self.unit.out
        return self.unit.kind == "bottleneck" or (self.unit.kind == "inverted" and same)


def blocks(net: Net, channels: int = 3) -> Iterator[Block]:
    """All blocks of a network that is given so many channels."""
    for number, unit in enumerate(net):
        for place in range(unit.depth):
            yield Block(
                unit if place == 0 else replace(unit, stride=1), channels, number, not place
            )
            channels = unit.out


@dataclass(frozen=True)
class Level:
    """What is known where a resolution ends, summed from the beginning.

    Attributes:
      unit: number of the last unit.
      blocks: how many.
      convolutions: how many.
      channels: that go out.
      side: of the grid.
      log_std: sum over the blocks.
      log_width: sum over the blocks.
    """

    unit: int
    blocks: int
    convolutions: int
    channels: int
    side: int
    log_std: float
    log_width: float

    @property
    def entropy(self) -> float:
        """Of what goes out."""
        return (math.log(self.channels) + 2 * math.log(self.side)) * self.log_std

    @property
    def effectiveness(self) -> float:
        """ρ: depth over the geometric mean of the widths."""
        return self.convolutions / math.exp(self.log_width / self.convolutions)


def levels(
    net: Net, image_size: int, *, channels: int = 3, sides_lost: bool = False
) -> tuple[Level, ...]:
    """The levels of a network, one before each unit of stride 2 but the first, and one at the end.

    Args:
      net: the network.
      image_size: side of the images.
      channels: of the images.
      sides_lost: after an inverted block sides count as 1, as in the official code, where channel
        attention says that it makes a single place of everything.
    """
    found, side, done = [], image_size, [0, 0]
    total_std = total_width = 0.0
    every = list(blocks(net, channels))
    for place, block in enumerate(every):
        side //= block.unit.stride
        if sides_lost and block.unit.kind == "inverted":
            side = 1
        side = max(side, 1)
        done = [done[0] + 1, done[1] + block.convolutions]
        total_std, total_width = total_std + block.log_std, total_width + block.log_width
        after = every[place + 1] if place + 1 < len(every) else None
        if after is None or after.unit.stride == 2:
            facts = (block.number, *done, block.unit.out, side, total_std, total_width)
            found.append(Level(*facts))
    return tuple(found)


def penalty(net: Net) -> float:
    """What unequal depths cost: 10 exp(standard deviation of the depths of rows of blocks).

    Networks of plain bottlenecks have a thin and a short beginning: their first two do not count.
    """
    rows = [unit for unit in net if unit.kind != "conv"]
    depths = [unit.depth for unit in rows]
    if all(unit.kind == "bottleneck" for unit in rows):
        depths = depths[2:]
    if not depths:
        return 0.0
    mean = sum(depths) / len(depths)
    return 10 * math.exp(math.sqrt(sum((depth - mean) ** 2 for depth in depths) / len(depths)))


def entropies(net: Net, image_size: int, *, sides_lost: bool = False) -> tuple[float, ...]:
    """The weighted entropies of the levels."""
    found = levels(net, image_size, sides_lost=sides_lost)
    weights = (1.0,) * max(0, len(found) - len(WEIGHTS)) + WEIGHTS[-len(found) :]
    return tuple(w * level.entropy for w, level in zip(weights, found, strict=True))


def score(net: Net, image_size: int, *, penalised: bool = True, sides_lost: bool = False) -> float:
    """What the design makes as large as it can: all entropies, less the penalty."""
    total = sum(entropies(net, image_size, sides_lost=sides_lost))
    return total - penalty(net) if penalised else total


def effectiveness(net: Net, image_size: int = 224) -> float:
    """ρ of the level where it is largest: the paper wants 0.3 or 0.5 at most."""
    return max(level.effectiveness for level in levels(net, image_size))


def parameters(net: Net, channels: int = 3) -> int:
    """Those of convolutions and norms, without the classifier."""
    total = 0
    for block in blocks(net, channels):
        u, c = block.unit, block.entering
        if u.kind == "conv":
            total += c * u.out * u.kernel**2 + 2 * u.out
            continue
        filters = u.kernel**2 * u.inner * (u.inner if u.kind == "bottleneck" else 1)
        total += c * u.inner + filters + u.inner * u.out + 2 * (2 * u.inner + u.out)
        if u.kind == "inverted":
            hidden = squeezed(u.inner)
            total += 2 * u.inner * hidden + 2 * (u.inner + hidden)
        if block.projects:
            total += c * u.out + 2 * u.out
    return total


def macs(net: Net, image_size: int, channels: int = 3) -> int:
    """Multiplications and additions of all convolutions, for one image, without the classifier."""
    total, side = 0, image_size
    for block in blocks(net, channels):
        u, c, before = block.unit, block.entering, side
        side = -(-side // u.stride)
        if u.kind == "conv":
            total += c * u.out * u.kernel**2 * side**2
            continue
        filters = u.kernel**2 * u.inner * (u.inner if u.kind == "bottleneck" else 1)
        total += c * u.inner * before**2 + (filters + u.inner * u.out) * side**2
        if u.kind == "inverted":
            total += 2 * u.inner * squeezed(u.inner)
        if block.projects:
            total += c * u.out * side**2
    return total


def budgeted_flops(net: Net, image_size: int, channels: int = 3) -> float:
    """FLOPs as the official search counts them: norms and activations too, no channel attention."""
    total, side = 0.0, image_size
    for block in blocks(net, channels):
        u, c, less = block.unit, block.entering, block.unit.stride**2
        if u.kind == "conv":
            flops = (c * u.out * u.kernel**2 + 3 * u.out) / less
        else:
            filters = u.kernel**2 * u.inner * (u.inner if u.kind == "bottleneck" else 1)
            flops = c * u.inner + 3 * u.inner
            flops += (filters + 3 * u.inner + u.inner * u.out + 3 * u.out) / less
            if block.skips and u.stride == 2:
                flops += c
            if block.projects:
                flops += (c * u.out + 3 * u.out) / less
        total += flops * side**2
        side //= u.stride
    return total
