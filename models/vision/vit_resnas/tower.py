"""The tower of ViT-ResNAS: stages of layers, and reductions with a residual between them.

With `kept`, every image goes through a sub-network of its own: what is not kept of a dimension is
zero, and norms do not count it, so that the numbers are those of the network that is cut out.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array, Features, Tokens
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import attend, everything
from zoo.models.parts.layers.conv import Conv, ConvNormAct
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DropPath, Rate, drop_path_stages
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.towers.pyramid import check_image_size, pyramid_features
from zoo.models.vision.vit_resnas.nets import PATCH, Layer, Net
from zoo.models.vision.vit_resnas.supernet import WHOLE, Kept, KeptLayer, first_channels


@dataclass(frozen=True)
class ResNASConfig:
    """A network.

    Attributes:
      net: its stages.
      image_size: side in pixels of the images that the positions were made for, a multiple of
        `stride`; it takes others.
      stem: channels of the three convolutions before the patches; 0 for patches alone.
      distill_token: a second token beside the class token, for what a teacher says.
      drop_path: in training, the share of examples for which a half of the last layer is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
    """

    net: Net
    image_size: int = 224
    stem: int = 24
    distill_token: bool = False
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.net:
            raise ValueError("net: want one stage at least")
        widths = [stage.width for stage in self.net]
        if widths != sorted(widths):
            raise ValueError(f"widths {widths}: want none below the one before it")
        check_image_size(self.image_size, self.stride)

    @property
    def stride(self) -> int:
        """Pixels per side of what one token of the last stage stands for."""
        return PATCH * 2 ** (len(self.net) - 1)

    @property
    def width(self) -> int:
        """D of the tokens, which are those of the last stage."""
        return self.net[-1].width

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.distill_token

    @property
    def class_token(self) -> bool:
        """Always there."""
        return True

    def side(self, stage: int) -> int:
        """Tokens per column and row of a stage, from 0, of an image of `image_size`."""
        return self.image_size // PATCH // 2**stage

    def build(self) -> "ResNAS":
        """The module."""
        return ResNAS(self)


@struct.dataclass
class ResNASFeatures(Features):
    """Features with the token for the teacher [..., D], None where there is none."""

    distill: Array | None = None


class FirstNorm(nn.Module):
    """A LayerNorm over the first channels of each example."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, number: Array | None = None) -> Array:
        """[B, N, C] to the same shape.

        Args:
          x: zeros in the channels that are not there.
          number: int [B], of those that are; None for all.
        """
        init = nn.with_logical_partitioning
        scale = self.param("scale", init(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        bias = self.param("bias", init(nn.initializers.zeros, ("norm",)), (x.shape[-1],))
        y = x.astype(jnp.float32)
        count = x.shape[-1] if number is None else number[:, None, None]
        y = first_channels(y - y.sum(-1, keepdims=True) / count, number)
        y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) / count + self.eps)
        return first_channels(y * scale + bias, number).astype(x.dtype)


class ResNASLayer(nn.Module):
    """`x + out(attention(norm(x)))`, then `x + down(gelu(up(norm(x))))`.

    Attributes:
      width: D.
      layer: its sizes.
    """

    width: int
    layer: Layer

    def setup(self) -> None:
        d, h, e, f = self.width, self.layer.num_heads, self.layer.head_dim, self.layer.mlp_dim
        heads, out = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")
        self.attn_norm, self.mlp_norm = FirstNorm(), FirstNorm()
        self.q, self.k, self.v = (
            Proj("...d,dhe->...he", (d, h, e), heads, bias=True) for _ in range(3)
        )
        self.out = Proj("...he,hed->...d", (h, e, d), out, num_in=2, bias=True)
        self.up = dense(d, f, bias=True)
        self.down = dense(f, d, bias=True, axes=("mlp", "embed"))
        self.drop_path = DropPath()

    def __call__(
        self, x: Array, kept: KeptLayer = WHOLE, *, rate: Rate = None, train: bool = False
    ) -> Array:
        """[B, N, D] to the same shape.

        Args:
          x: zeros in the channels that are not there.
          kept: what is.
          rate: of dropped paths.
          train: whether they are dropped.
        """
        y = self.attention(self.attn_norm(x, kept.width), kept.num_heads)
        x = x + first_channels(self.drop_path(y, rate, train=train), kept.branch)
        y = ACTIVATIONS["gelu"](self.up(self.mlp_norm(x, kept.width)))
        y = self.down(first_channels(y, kept.mlp_dim))
        return x + first_channels(self.drop_path(y, rate, train=train), kept.branch)

    def attention(self, x: Array, heads: Array | None) -> Array:
        """The attention branch [B, N, D] of what is normed already, by the first heads."""
        tokens = Tokens.sequence(jnp.ones(x.shape[:2], bool))
        y = attend(self.q(x), self.k(x), self.v(x), everything, tokens, tokens)  # [B, N, H, E]
        return self.out(first_channels(y.swapaxes(-1, -2), heads).swapaxes(-1, -2))


class Reduction(nn.Module):
    """Residual spatial reduction: a grid of half the sides and of another width.

    Attributes:
      config: of the tower.
      stage: that it leads to.
    """

    config: ResNASConfig
    stage: int

    def setup(self) -> None:
        c, before, width = self.config, *(s.width for s in self.config.net[self.stage - 1 :][:2])
        self.norm = FirstNorm()
        self.conv = Conv(width, 3, 2, padding=1)
        self.token = dense(before, width, bias=True)
        self.position = _table(self, "position", c.side(self.stage) ** 2, width)

    def __call__(self, x: Array, grid: tuple[int, int], width: Array | None = None) -> Array:
        """[B, P + h w, C] to [B, P + h w / 4, D]; `width` [B] as of `FirstNorm`."""
        c, p = self.config, self.config.prefix

        def picture(x: Array) -> Array:
            """The patches of [B, P + h w, C]."""
            return x[:, p:].reshape(x.shape[0], *grid, x.shape[-1])

        y = self.norm(x, width)
        table = resized(self.position, c.side(self.stage), grid[0] // 2, grid[1] // 2)
        patches = self.conv(picture(y))
        patches = patches.reshape(x.shape[0], -1, patches.shape[-1]) + table.astype(x.dtype)
        mean = nn.avg_pool(picture(x), (2, 2), (2, 2)).reshape(x.shape[0], -1, x.shape[-1])
        rest = jnp.concatenate([x[:, :p], mean], 1)
        rest = jnp.pad(rest, ((0, 0), (0, 0), (0, patches.shape[-1] - x.shape[-1])))
        return rest + jnp.concatenate([self.token(y[:, :p]), patches], 1)


class ConvStem(nn.Module):
    """Pixels [B, H, W, C] to tokens [B, N, D]: three convolutions, the last two with a shortcut,
    then patches of the half resolution.

    Attributes:
      width: D.
      hidden: channels of the convolutions.
    """

    width: int
    hidden: int

    def setup(self) -> None:
        self.convs = [ConvNormAct(self.hidden, 3, stride) for stride in (2, 1, 1)]
        self.proj = Conv(self.width, PATCH // 2, PATCH // 2, padding=0)

    def __call__(self, pixels: Array, *, train: bool = False) -> Array:
        first = self.convs[0](pixels, train=train)
        y = self.convs[2](self.convs[1](first, train=train), train=train)
        y = self.proj(first + y)
        return y.reshape(y.shape[0], -1, self.width)


class ResNAS(nn.Module):
    """Stages of layers with a reduction before each but the first.

    `features.tokens` are the patches of the last stage and `features.cls` the class token, both
    after the final norm; `features.pyramid` are the patches of all stages before it, and
    `features.taps[k]` those of stage k, as tokens.
    """

    config: ResNASConfig

    def setup(self) -> None:
        c, first = self.config, self.config.net[0].width
        plain = PatchEmbed(PATCH, first, c.channels)
        self.patch = ConvStem(first, c.stem) if c.stem else plain
        self.tokens = _table(self, "tokens", c.prefix, first, "queries")
        self.position = _table(self, "position", c.prefix + c.side(0) ** 2, first)
        self.layers = [
            [ResNASLayer(stage.width, each) if each.present else None for each in stage.layers]
            for stage in c.net
        ]
        self.reductions = [Reduction(c, stage) for stage in range(1, len(c.net))]
        self.norm = FirstNorm()

    def __call__(
        self,
        pixels: Array,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        kept: Kept | None = None,
    ) -> ResNASFeatures:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; H and W are any multiples of `stride`.
          train: whether batch statistics are those of the batch, and paths are dropped, by the
            random stream "dropout".
          taps: stages whose patches to return as tokens, from 1.
          kept: the sub-network that each image goes through; None for the whole network.

        Raises:
          ValueError: another image, or a stage that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels, multiple=c.stride)
        x = pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype)
        grid = (x.shape[1] // PATCH, x.shape[2] // PATCH)
        x, pyramid, number = self._embed(x, grid, train=train), [], 0
        rates = drop_path_stages([len(stage.layers) for stage in c.net], c.drop_path)
        width = None
        for stage, layers in enumerate(self.layers):
            if stage:
                x = self.reductions[stage - 1](x, grid, width)
                grid = (grid[0] // 2, grid[1] // 2)
            width = None if kept is None else kept.widths[:, stage]
            x = first_channels(x, width)
            for i, layer in enumerate(layers):
                if layer is not None:
                    rate = None if rates[stage] is None else rates[stage][i]
                    part = WHOLE if kept is None else kept.layer(stage, number)
                    x = layer(x, part, rate=rate, train=train)
                number += 1
            pyramid.append(x[:, c.prefix :].reshape(*lead, *grid, x.shape[-1]))
        x = self.norm(x, width)
        last = x[:, c.prefix :].reshape(*lead, *grid, x.shape[-1])
        found = pyramid_features(tuple(pyramid), taps, last=last)
        cls, *others = (x[:, i].reshape(*lead, x.shape[-1]) for i in range(c.prefix))
        parts = {name: getattr(found, name) for name in ("tokens", "grid", "taps", "pyramid")}
        return ResNASFeatures(**parts, cls=cls, distill=others[0] if others else None)

    def _embed(self, pixels: Array, grid: tuple[int, int], *, train: bool) -> Array:
        """The input of the first layer [B, P + N, D]."""
        c = self.config
        x = self.patch(pixels, train=train) if c.stem else self.patch(pixels)
        before = jnp.broadcast_to(self.tokens, (x.shape[0], *self.tokens.shape)).astype(x.dtype)
        table = resized(self.position[c.prefix :], c.side(0), *grid)
        table = jnp.concatenate([self.position[: c.prefix], table])
        return jnp.concatenate([before, x], 1) + table.astype(x.dtype)


def resized(table: Array, side: int, height: int, width: int) -> Array:
    """Positions [side^2, D] for another grid: [height width, D]."""
    if (height, width) == (side, side):
        return table
    grid = table.astype(jnp.float32).reshape(side, side, -1)
    return resize_bicubic(grid, height, width).reshape(height * width, -1)


def _table(module: nn.Module, name: str, rows: int, width: int, axis: str = "positions") -> Array:
    """A parameter [rows, width] that is added to tokens, or stands for some."""
    init = nn.with_logical_partitioning(nn.initializers.truncated_normal(0.02), (axis, "embed"))
    return module.param(name, init, (rows, width))
