"""ConvNeXt: a convolutional tower, which takes images of any size. Follows: arXiv:2201.03545."""

from dataclasses import dataclass

import flax.linen as nn

from zoo.models.core.keytable import Row, Table, conv, linear, same
from zoo.models.core.types import Array, Features
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.conv import depthwise
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DropPath, Rate, drop_path_stages
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import check_image_size, pyramid_features


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Sizes of a ConvNeXt. The defaults are ConvNeXt-L at 320 pixels.

    Every stage has half the resolution of the one before; the first has a quarter of the image's.

    Attributes:
      image_size: side in pixels of the images that `grid` speaks of, a multiple of `stride`; the
        tower takes images of other sizes as well.
      depths: layers of each stage.
      widths: channels of each stage.
      kernel_size: side of the depthwise kernels.
      mlp_ratio: hidden width of the MLPs, in widths.
      norm_eps: epsilon of the norms.
      layer_scale: first value of the learned gain on each layer.
      drop_path: in training, the share of examples for which the last layer is left out; it rises
        evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
    """

    image_size: int = 320
    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (192, 384, 768, 1536)
    kernel_size: int = 7
    mlp_ratio: int = 4
    norm_eps: float = 1e-6
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"depths = {self.depths} and widths = {self.widths}: want one of each per stage"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size = {self.kernel_size}: want an odd number")
        check_image_size(self.image_size, self.stride)

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

    def build(self) -> "ConvNeXt":
        """The module."""
        return ConvNeXt(self)


class ConvNeXtBlock(nn.Module):
    """`x + gain * down(gelu(up(norm(conv(x)))))` on grids [B, h, w, D]."""

    width: int
    mlp_dim: int
    kernel_size: int
    norm_eps: float
    layer_scale: float

    def setup(self) -> None:
        self.conv = depthwise(self.width, self.kernel_size)
        self.norm = LayerNorm(self.norm_eps)
        self.up = dense(self.width, self.mlp_dim, bias=True)
        self.down = dense(self.mlp_dim, self.width, bias=True, axes=("mlp", "embed"))
        init = nn.initializers.constant(self.layer_scale)
        init = nn.with_logical_partitioning(init, ("norm",))
        self.gain = self.param("gain", init, (self.width,))
        self.drop_path = DropPath()

    def __call__(self, x: Array, *, rate: Rate = None, train: bool = False) -> Array:
        y = self.down(ACTIVATIONS["gelu"](self.up(self.norm(self.conv(x)))))
        return x + self.drop_path(self.gain.astype(y.dtype) * y, rate, train=train)


class ConvNeXt(nn.Module):
    """Stages of layers, without pooling and head.

    `features.tokens` are the last stage's outputs, rows first, and `features.grid` their grid;
    `features.pyramid` are those of all stages, and `features.taps[k]` those of stage k, as tokens.
    """

    config: ConvNeXtConfig

    def setup(self) -> None:
        c = self.config
        before = (c.channels, *c.widths)
        sizes = [4] + [2] * (len(c.widths) - 1)
        self.patches = [
            PatchEmbed(size, width, channels)
            for size, width, channels in zip(sizes, c.widths, before[:-1], strict=True)
        ]
        self.norms = [LayerNorm(c.norm_eps) for _ in c.widths]
        self.stages = [
            Repeat(self._block(width), depth)
            for width, depth in zip(c.widths, c.depths, strict=True)
        ]

    def _block(self, width: int) -> ConvNeXtBlock:
        c = self.config
        hidden = c.mlp_ratio * width
        return ConvNeXtBlock(width, hidden, c.kernel_size, c.norm_eps, c.layer_scale, parent=None)

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; H and W are any multiples of the stride. Leading axes
            are free.
          train: whether paths are dropped, by the random stream "dropout".
          taps: stages whose output to return as tokens, from 1.

        Raises:
          ValueError: another image, or a stage that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels, multiple=c.stride)
        x = pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype)  # [B, h, w, D]
        rates = drop_path_stages(c.depths, c.drop_path)
        pyramid = []
        parts = zip(self.patches, self.norms, self.stages, rates, strict=True)
        for number, (patch, norm, stage, rate) in enumerate(parts):
            grid = tuple(side // patch.patch_size for side in x.shape[1:3])
            # The image is cut and then normed; later grids are normed and then cut.
            x = norm(patch(x)) if number == 0 else patch(norm(x))  # [B, h w, D]
            x = stage(x.reshape(-1, *grid, x.shape[-1]), train=train, each={"rate": rate})
            pyramid.append(x.reshape(*lead, *x.shape[1:]))
        return pyramid_features(tuple(pyramid), taps)


def convnext_table(config: ConvNeXtConfig, *, gain: str = "gamma") -> Table:
    """Keys of timm's checkpoints, without those of the head; `gain` is the key of a layer's."""
    rows = []
    for number, depth in enumerate(config.depths):
        at = f"stages.{number}."
        patch, norm = (f"{at}downsample.1", f"{at}downsample.0") if number else ("stem.0", "stem.1")
        rows += [
            Row(f"patches_{number}/kernel", f"{patch}.weight", conv),
            Row(f"patches_{number}/bias", f"{patch}.bias"),
            Row(f"norms_{number}/scale", f"{norm}.weight"),
            Row(f"norms_{number}/bias", f"{norm}.bias"),
        ]
        ours, theirs, steps = f"stages_{number}/layers/", f"{at}blocks.{{}}.", tuple(range(depth))
        rows.append(Row(f"{ours}gain", f"{theirs}{gain}", steps=steps))
        for name, key, leaf, transform in (
            ("conv", "conv_dw", "kernel", conv),
            ("norm", "norm", "scale", same),
            ("up", "mlp.fc1", "kernel", linear()),
            ("down", "mlp.fc2", "kernel", linear()),
        ):
            rows.append(Row(f"{ours}{name}/{leaf}", f"{theirs}{key}.weight", transform, steps))
            rows.append(Row(f"{ours}{name}/bias", f"{theirs}{key}.bias", steps=steps))
    return Table(tuple(rows))
