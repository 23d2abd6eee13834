"""DeepMAD: convolutional networks that are solutions of a small mathematical programme.

Nothing is trained in the design: a closed form, the entropy of a network, is made as large as it
can be under budgets, one of which, the effectiveness, bounds depth by width (`score`, `design`).
The networks are rows of bottlenecks, or of inverted ones with channel attention.

Follows: arXiv:2303.02165.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax

from zoo.models.core.card import Card
from zoo.models.core.keytable import AnyRow, Table, conv, norm_rows, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.conv import ConvNormAct
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import as_tokens, check_image_size, pyramid_features
from zoo.models.vision.deepmad.design import DesignConfig
from zoo.models.vision.deepmad.nets import NETS, inverted, plain
from zoo.models.vision.deepmad.score import Block, Unit, blocks, squeezed

CARD = Card(
    slug="deepmad",
    paper="arXiv:2303.02165",
    code="https://github.com/alibaba/lightweight-neural-architecture-search",
    differs=(
        "The entropy of inverted blocks knows the sides of their grids; the official code loses "
        "them (`sides_lost=True` does as well).",
        "Budgets count multiplications and additions; the official count, which has norms and "
        "activations too, is `budgeted_flops`.",
        "The head starts as every other linear map.",
    ),
)


@dataclass(frozen=True)
class DeepMADConfig:
    """A network of units.

    Attributes:
      image_size: side in pixels of the images that it is made for; it takes others.
      units: what it consists of.
      channels: of the images.
      dtype: in which activations are computed.
    """

    image_size: int
    units: tuple[Unit, ...]
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.units:
            raise ValueError("units: want one at least")
        check_image_size(self.image_size, self.stride)

    @property
    def stride(self) -> int:
        """Pixels per side of what one token stands for."""
        return 2 ** sum(unit.stride == 2 for unit in self.units)

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.units[-1].out

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of an image of `image_size`."""
        return (self.image_size // self.stride,) * 2

    def build(self) -> "DeepMAD":
        """The module."""
        return DeepMAD(self)


class NormedExcite(nn.Module):
    """`x * gate(expand(silu(reduce(mean of x))))` with a norm after each of the two maps.

    Attributes:
      width: C of the grids [B, h, w, C].
    """

    width: int

    def setup(self) -> None:
        self.reduce = ConvNormAct(squeezed(self.width), 1, activation="silu")
        self.expand = ConvNormAct(self.width, 1, activation=None)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """To the same shape."""
        mean = x.mean((1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.expand(self.reduce(mean, train=train), train=train))


class DeepMADBlock(nn.Module):
    """1 x 1, k x k, channel attention where it is inverted, 1 x 1, a shortcut, an activation."""

    block: Block

    def setup(self) -> None:
        u = self.block.unit
        groups = u.inner if u.kind == "inverted" else 1
        self.reduce = ConvNormAct(u.inner, 1, activation=self.activation)
        self.spatial = ConvNormAct(
            u.inner, u.kernel, u.stride, groups=groups, activation=self.activation
        )
        if u.kind == "inverted":
            self.excite = NormedExcite(u.inner)
        self.expand = ConvNormAct(u.out, 1, activation=None)
        if self.block.projects:
            self.shortcut = ConvNormAct(u.out, 1, activation=None)

    @property
    def activation(self) -> str:
        """Of all layers."""
        return "relu" if self.block.unit.kind == "bottleneck" else "silu"

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, h, w, C] to the grid of the stride."""
        u = self.block.unit
        y = self.spatial(self.reduce(x, train=train), train=train)
        if u.kind == "inverted":
            y = self.excite(y, train=train)
        y = self.expand(y, train=train)
        if self.block.skips:
            if u.stride == 2:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            y = y + (self.shortcut(x, train=train) if self.block.projects else x)
        return ACTIVATIONS[self.activation](y)


class UnitRow(nn.Module):
    """A unit: a convolution, or the first block and the others.

    Attributes:
      unit: which.
      entering: channels that come in.
    """

    unit: Unit
    entering: int

    def setup(self) -> None:
        u = self.unit
        if u.kind == "conv":
            self.conv = ConvNormAct(u.out, u.kernel, u.stride)
            return
        every = list(blocks([u], self.entering))
        self.first = DeepMADBlock(every[0])
        if u.depth > 1:
            self.rest = Repeat(DeepMADBlock(every[1], parent=None), u.depth - 1)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, h, w, C] to the grid of the stride."""
        if self.unit.kind == "conv":
            return self.conv(x, train=train)
        x = self.first(x, train=train)
        return self.rest(x, train=train) if self.unit.depth > 1 else x


class DeepMAD(nn.Module):
    """Units one after the other.

    `features.tokens` are the last unit's outputs, rows first, `features.pyramid` those with which
    each resolution ends, and `features.taps[k]` those of unit k, as tokens.
    """

    config: DeepMADConfig

    def setup(self) -> None:
        c = self.config
        before = (c.channels, *(unit.out for unit in c.units[:-1]))
        self.rows = [UnitRow(u, entering) for u, entering in zip(c.units, before, strict=True)]

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; H and W are any multiples of the stride. Leading axes
            are free.
          train: whether batch statistics are those of the batch, and the running ones move.
          taps: units whose output to return as tokens, from 1.

        Raises:
          ValueError: another image, or a unit that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels, multiple=c.stride)
        if bad := [tap for tap in taps if not 1 <= tap <= len(c.units)]:
            raise ValueError(f"taps {bad}: want 1 to {len(c.units)}, the units of the tower")
        grids = self.grids(pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype), train=train)
        grids = tuple(x.reshape(*lead, *x.shape[1:]) for x in grids)
        after = (*(unit.stride for unit in c.units[1:]), 2)
        pyramid = tuple(x for x, stride in zip(grids, after, strict=True) if stride == 2)
        found = {tap: as_tokens(grids[tap - 1]) for tap in taps}
        return pyramid_features(pyramid).replace(taps=found)

    def grids(self, x: Array, *, train: bool = False) -> tuple[Array, ...]:
        """What all units make of [B, H, W, C]."""
        found = []
        for row in self.rows:
            x = row(x, train=train)
            found.append(x)
        return tuple(found)


_TINY = (
    Unit("conv", 8, 3, 2),
    Unit("bottleneck", 16, 3, 2, 2, 8),
    Unit("inverted", 12, 3, 2, 1, 24),
    Unit("inverted", 12, 5, 1, 2, 24),
)

VARIANTS = {
    **{
        f"deepmad_{name}": ClassifierConfig(DeepMADConfig(side, net), "mean", num_classes=1000)
        for name, (side, net) in NETS.items()
    },
    "deepmad_tiny": ClassifierConfig(DeepMADConfig(32, _TINY), "mean", num_classes=5),
    # The programmes that have networks of these sizes for solutions.
    "deepmad_design_r18": DesignConfig(
        start=plain(
            32,
            (3, 128, 2, 1, 32),
            (3, 256, 2, 3, 32),
            (3, 384, 2, 5, 48),
            (3, 512, 1, 5, 64),
            (3, 512, 2, 5, 64),
        ),
        max_parameters=11_690_000,
        max_macs=1.82e9,
        max_effectiveness=0.3,
    ),
    "deepmad_design_29m": DesignConfig(
        start=inverted(
            32,
            1792,
            (3, 40, 1, 1, 160),
            (3, 64, 2, 2, 256),
            (3, 96, 2, 3, 384),
            (3, 160, 2, 3, 640),
            (3, 256, 2, 3, 1024),
        ),
        kernels=(3, 5, 7),
        max_parameters=29_000_000,
        max_macs=4.5e9,
        max_effectiveness=0.5,
    ),
}


def _conv_rows(ours: str, theirs: str, steps: tuple[int, ...] | None = None) -> list[AnyRow]:
    rows: list[AnyRow] = weight_rows(
        f"{ours}/conv", f"{theirs}conv1", conv, steps=steps, bias=False
    )
    return rows + norm_rows(f"{ours}/norm", f"{theirs}bn1", steps=steps, stats=True)


def _block_rows(
    block: Block, ours: str, theirs: str, steps: tuple[int, ...] | None = None
) -> list[AnyRow]:
    parts = {"reduce": "conv1", "spatial": "conv2", "expand": "conv3"}
    if block.unit.kind == "inverted":
        parts |= {"excite/reduce": "se2.conv1", "excite/expand": "se2.conv2"}
    if block.projects:
        parts["shortcut"] = "residual_proj"
    rows: list[AnyRow] = []
    for name, key in parts.items():
        rows += _conv_rows(f"{ours}/{name}", f"{theirs}{key}.", steps)
    return rows


def table(config: ClassifierConfig) -> Table:
    """Keys of the official files."""
    rows: list[AnyRow] = []
    entering = config.tower.channels
    for number, unit in enumerate(config.tower.units):
        ours, theirs = f"rows_{number}", f"block_list.{number}."
        every = list(blocks([unit], entering))
        entering = unit.out
        if unit.kind == "conv":
            rows += _conv_rows(f"{ours}/conv", theirs)
            continue
        rows += _block_rows(every[0], f"{ours}/first", f"{theirs}block_list.0.")
        if unit.depth > 1:
            at, steps = f"{theirs}block_list.{{}}.", tuple(range(1, unit.depth))
            rows += _block_rows(every[1], f"{ours}/rest/layers", at, steps)
    body = Table(tuple(rows)).under("tower")
    return (body + head_table(config, head="fc_linear")).with_stats()


register(CARD, VARIANTS, table=table)
