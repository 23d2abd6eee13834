"""InceptionNeXt: ConvNeXt with its large depthwise kernels cut into branches by channels.

An eighth of the channels is filtered by 3 x 3 kernels, one by horizontal and one by vertical bands,
and the rest is left alone.

Follows: arXiv:2303.16900.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.card import Card
from zoo.models.core.keytable import (
    AnyRow,
    Row,
    Table,
    conv,
    norm_rows,
    pointwise,
    weight_rows,
)
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features
from zoo.models.parts.assemblies.classifier import Classifier, ClassifierConfig
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.conv import depthwise
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DropPath, Rate, drop_path_stages
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import BatchNorm, LayerNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import check_image_size, pyramid_features

CARD = Card(
    slug="inceptionnext",
    paper="arXiv:2303.16900",
    code="https://github.com/sail-sg/inceptionnext",
    differs=("In training, batch statistics are those of the whole batch over all devices.",),
)


@dataclass(frozen=True)
class InceptionNeXtConfig:
    """Sizes of an InceptionNeXt. The defaults are InceptionNeXt-T.

    Attributes:
      image_size: side in pixels of the images that `grid` speaks of, a multiple of `stride`; the
        tower takes images of other sizes as well.
      depths: layers of each stage.
      widths: channels of each stage.
      mlp_ratios: hidden width of the MLPs of each stage, in widths.
      branch: the share of the channels of each of the three convolutions, rounded down.
      band: length of the bands.
      layer_scale: first value of the learned gain on each layer.
      drop_path: in training, the share of examples for which the last layer is left out; it rises
        evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
    """

    image_size: int = 224
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 3)
    branch: float = 1 / 8
    band: int = 11
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len({len(self.depths), len(self.widths), len(self.mlp_ratios)}) > 1 or not self.depths:
            raise ValueError(
                f"depths = {self.depths}, widths = {self.widths} and mlp_ratios = "
                f"{self.mlp_ratios}: want one of each per stage"
            )
        if self.band % 2 == 0:
            raise ValueError(f"band = {self.band}: want an odd number")
        if not all(1 <= int(width * self.branch) <= width // 3 for width in self.widths):
            raise ValueError(
                f"branch = {self.branch}: want a share of {self.widths} channels that is one "
                "channel at least and a third at most"
            )
        check_image_size(self.image_size, self.stride)
        drop_path_stages(self.depths, self.drop_path)

    @property
    def stride(self) -> int:
        """Pixels per side of what one token stands for."""
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of an image of `image_size`."""
        return (self.image_size // self.stride,) * 2

    def build(self) -> "InceptionNeXt":
        """The module."""
        return InceptionNeXt(self)


class InceptionConv(nn.Module):
    """Depthwise convolutions on the last channels, in this order: 3 x 3, a row, a column; the first
    channels stay as they are.

    Attributes:
      branch: channels of each.
      band: length of row and column.
    """

    branch: int
    band: int

    def setup(self) -> None:
        self.square = depthwise(self.branch, 3)
        self.row = depthwise(self.branch, (1, self.band))
        self.column = depthwise(self.branch, (self.band, 1))

    def __call__(self, x: Array) -> Array:
        """[B, h, w, D] to the same shape."""
        rest = x.shape[-1] - 3 * self.branch
        same, a, b, c = jnp.split(x, [rest, rest + self.branch, rest + 2 * self.branch], -1)
        return jnp.concatenate([same, self.square(a), self.row(b), self.column(c)], -1)


class InceptionNeXtBlock(nn.Module):
    """`x + gain * down(gelu(up(norm(mixer(x)))))` on grids [B, h, w, D]."""

    width: int
    mlp_dim: int
    branch: int
    band: int
    layer_scale: float

    def setup(self) -> None:
        self.mixer = InceptionConv(self.branch, self.band)
        self.norm = BatchNorm()
        self.up = dense(self.width, self.mlp_dim, bias=True)
        self.down = dense(self.mlp_dim, self.width, bias=True, axes=("mlp", "embed"))
        init = nn.initializers.constant(self.layer_scale)
        init = nn.with_logical_partitioning(init, ("norm",))
        self.gain = self.param("gain", init, (self.width,))
        self.drop_path = DropPath()

    def __call__(self, x: Array, *, rate: Rate = None, train: bool = False) -> Array:
        y = self.up(self.norm(self.mixer(x), train=train))
        y = self.down(ACTIVATIONS["gelu"](y)) * self.gain.astype(x.dtype)
        return x + self.drop_path(y, rate, train=train)


class InceptionNeXt(nn.Module):
    """Stages of layers, without pooling and head.

    `features.tokens` are the last stage's outputs, rows first, `features.pyramid` those of all
    stages, and `features.taps[k]` those of stage k, as tokens.
    """

    config: InceptionNeXtConfig

    def setup(self) -> None:
        c = self.config
        before = (c.channels, *c.widths)
        self.patches = [
            PatchEmbed(2 if stage else 4, width, before[stage], trim=True)
            for stage, width in enumerate(c.widths)
        ]
        self.norms = [BatchNorm() for _ in c.widths]
        self.stages = [Repeat(self._block(i), depth) for i, depth in enumerate(c.depths)]

    def _block(self, stage: int) -> InceptionNeXtBlock:
        c, width = self.config, self.config.widths[stage]
        hidden, branch = c.mlp_ratios[stage] * width, int(width * c.branch)
        return InceptionNeXtBlock(width, hidden, branch, c.band, c.layer_scale, parent=None)

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised, of any size from the stride on; what is beyond whole
            cells at the right and the bottom is not seen. Leading axes are free.
          train: whether norms use the statistics of the batch and move the running ones, and paths
            are dropped, by the random stream "dropout".
          taps: stages whose output to return as tokens, from 1.

        Raises:
          ValueError: another image, or a stage that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels, least=c.stride)
        x = jnp.asarray(pixels).reshape(-1, *pixels.shape[-3:]).astype(c.dtype)
        rates, pyramid = drop_path_stages(c.depths, c.drop_path), []
        for number, (stage, rate) in enumerate(zip(self.stages, rates, strict=True)):
            patch, norm = self.patches[number], self.norms[number]
            grid = tuple(side // patch.patch_size for side in x.shape[1:3])
            # The image is cut and then normed; later grids are normed and then cut.
            x = norm(patch(x), train=train) if number == 0 else patch(norm(x, train=train))
            x = stage(x.reshape(-1, *grid, x.shape[-1]), train=train, each={"rate": rate})
            pyramid.append(x.reshape(*lead, *x.shape[1:]))
        return pyramid_features(tuple(pyramid), taps)


@dataclass(frozen=True)
class InceptionNeXtClassifierConfig(ClassifierConfig):
    """The classifier, whose head is an MLP.

    Attributes:
      head_ratio: hidden width of the head, in widths of the tower.
    """

    head_ratio: int = 3

    def build(self) -> "InceptionNeXtClassifier":
        """The module."""
        return InceptionNeXtClassifier(self)


class InceptionNeXtClassifier(Classifier):
    """`head(norm(gelu(up(mean of the tokens))))`."""

    def setup_head(self) -> None:
        """The parts of `judge`."""
        width, classes = self.config.pooled_width, self.config.num_classes
        hidden = width * self.config.head_ratio
        self.up = dense(width, hidden, bias=True)
        self.mlp_norm = LayerNorm(1e-6)
        self.head = Proj("...d,dk->...k", (hidden, classes), ("embed", "classes"), bias=True)

    def judge(self, pooled: Array, *, train: bool) -> Array:
        """Logits of pooled vectors; the norm follows the activation."""
        del train
        return self.head(self.mlp_norm(ACTIVATIONS["gelu"](self.up(pooled))))


def _size(**sizes: object) -> InceptionNeXtClassifierConfig:
    return InceptionNeXtClassifierConfig(InceptionNeXtConfig(**sizes), "mean", num_classes=1000)


_DEEP = (3, 3, 27, 3)
_BASE = {"depths": _DEEP, "widths": (128, 256, 512, 1024)}

# Stochastic depth of the published training, as `drop_path`: T 0.1, S 0.3, B 0.4, B at 384 0.7.
VARIANTS = {
    "inceptionnext_t": _size(),
    "inceptionnext_atto": _size(
        depths=(2, 2, 6, 2), widths=(40, 80, 160, 320), branch=1 / 4, band=9
    ),
    "inceptionnext_s": _size(depths=_DEEP),
    "inceptionnext_b": _size(**_BASE),
    "inceptionnext_b.384": _size(**_BASE, image_size=384),
    "inceptionnext_tiny": InceptionNeXtClassifierConfig(
        InceptionNeXtConfig(
            image_size=32, depths=(1, 2), widths=(16, 24), mlp_ratios=(2, 2), band=5
        ),
        "mean",
        num_classes=5,
    ),
}

_CONVOLUTIONS = {"square": "dwconv_hw", "row": "dwconv_w", "column": "dwconv_h"}


def tower_table(config: InceptionNeXtConfig) -> Table:
    """Keys of the tower in the official files and in timm's, which are the same."""
    rows: list[AnyRow] = []
    for number, depth in enumerate(config.depths):
        at, steps = f"stages.{number}.", tuple(range(depth))
        patch, norm = (f"{at}downsample.1", f"{at}downsample.0") if number else ("stem.0", "stem.1")
        rows += weight_rows(f"patches_{number}", patch, conv)
        rows += norm_rows(f"norms_{number}", norm, stats=True)
        ours, theirs = f"stages_{number}/layers/", f"{at}blocks.{{}}."
        rows.append(Row(f"{ours}gain", f"{theirs}gamma", steps=steps))
        for name, key in _CONVOLUTIONS.items():
            path = f"{ours}mixer/{name}"
            rows += weight_rows(path, f"{theirs}token_mixer.{key}", conv, steps=steps)
        rows += norm_rows(f"{ours}norm", f"{theirs}norm", steps=steps, stats=True)
        for name, key in (("up", "mlp.fc1"), ("down", "mlp.fc2")):
            rows += weight_rows(f"{ours}{name}", f"{theirs}{key}", pointwise, steps=steps)
    return Table(tuple(rows))


def table(config: InceptionNeXtClassifierConfig) -> Table:
    """Keys of the official files and of timm's."""
    head = [
        *weight_rows("up", "head.fc1"),
        *norm_rows("mlp_norm", "head.norm"),
        *weight_rows("head", "head.fc2"),
    ]
    whole = tower_table(config.tower).under("tower") + Table(tuple(head))
    return whole.with_stats()


register(CARD, VARIANTS, table=table)
