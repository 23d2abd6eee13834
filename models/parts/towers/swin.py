"""Swin: a hierarchical transformer whose attention stays inside windows, which every other layer
shifts.

Follows: arXiv:2103.14030.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.keytable import (
    AnyRow,
    Ignored,
    Row,
    Table,
    conv,
    flat,
    linear,
    norm_rows,
    split,
    weight_rows,
)
from zoo.models.core.types import Array, Features
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DropPath, Rate, drop_path_stages
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.layers.window import (
    Grid,
    RelativeBias,
    crop,
    pad,
    partition,
    reverse,
    shift,
    shift_mask,
    window_attention,
)
from zoo.models.parts.towers.pyramid import pyramid_features
from zoo.models.parts.towers.vit import Names


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin. The defaults are Swin-T at 224 pixels.

    Every stage has half the resolution of the one before, twice the channels, and its own number of
    layers and heads.

    Attributes:
      image_size: side in pixels of the images whose grids decide the windows: where a stage's grid
        is no larger than `window`, it is one window, without shifts. The tower takes images of any
        other size as well; grids are filled up with zeros to whole windows.
      patch_size: side of a patch in pixels.
      first_width: channels of the first stage.
      depths: layers of each stage.
      num_heads: attention heads of each stage.
      window: side of the windows.
      mlp_ratio: hidden width of the MLPs, in widths.
      norm_eps: epsilon of the norms.
      pad_first: grids are filled up before the shift, as transformers and the official detection
        code do; otherwise after it, as timm does. The two differ only where windows do not fit.
      drop_path: in training, the share of examples for which a half of the last layer is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
    """

    image_size: int = 224
    patch_size: int = 4
    first_width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    pad_first: bool = False
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise ValueError(
                f"depths = {self.depths} and num_heads = {self.num_heads}: want one of each per "
                "stage"
            )
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"num_heads = {self.num_heads}: {heads} does not divide {width}")
        if self.window < 1 or self.image_size < 1:
            raise ValueError(
                f"window = {self.window} and image_size = {self.image_size}: want 1 or more"
            )
        drop_path_stages(self.depths, self.drop_path)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.first_width * 2**stage for stage in range(len(self.depths)))

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels per side of what one token stands for."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the grid of each stage, for images of `image_size`."""
        sides = [-(-self.image_size // self.patch_size)]
        for _ in self.depths[1:]:
            sides.append((sides[-1] + 1) // 2)
        return tuple(sides)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of an image of `image_size`."""
        return (self.sides[-1],) * 2

    def build(self) -> "Swin":
        """The module."""
        return Swin(self)


class SwinBlock(nn.Module):
    """Attention inside windows and an MLP, each normed before and with a residual, on grids [B,
    *grid, D] of as many axes as the window has.

    Attributes:
      width: D.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      window: sides of the windows.
      shift: how far the grid is shifted before it is cut into windows.
      norm_eps: epsilon of the norms.
      pad_first: as in `SwinConfig`; a shift is then left out where a side of the grid is no longer
        than its window.
    """

    width: int
    num_heads: int
    mlp_dim: int
    window: Grid
    shift: Grid
    norm_eps: float = 1e-5
    pad_first: bool = False

    def setup(self) -> None:
        d, h, e = self.width, self.num_heads, self.width // self.num_heads
        heads = ("embed", "heads", "head_dim")
        self.attn_norm = LayerNorm(self.norm_eps)
        self.q = Proj("...d,dhe->...he", (d, h, e), heads, bias=True)
        self.k = Proj("...d,dhe->...he", (d, h, e), heads, bias=True)
        self.v = Proj("...d,dhe->...he", (d, h, e), heads, bias=True)
        out = ("heads", "head_dim", "embed")
        self.out = Proj("...he,hed->...d", (h, e, d), out, num_in=2, bias=True)
        self.relative_bias = RelativeBias(self.window, h)
        self.mlp_norm = LayerNorm(self.norm_eps)
        self.up = dense(d, self.mlp_dim, bias=True)
        self.down = dense(self.mlp_dim, d, bias=True, axes=("mlp", "embed"))
        self.drop_path = DropPath()

    def __call__(self, x: Array, *, rate: Rate = None, train: bool = False) -> Array:
        """[B, *grid, D] to the same shape; `rate` is that of `DropPath`."""
        x = x + self.drop_path(self.attention(self.attn_norm(x)), rate, train=train)
        y = self.down(ACTIVATIONS["gelu"](self.up(self.mlp_norm(x))))
        return x + self.drop_path(y, rate, train=train)

    def attention(self, x: Array) -> Array:
        """Attention of [B, *grid, D] within windows, without norm and residual."""
        grid, by = x.shape[1:-1], self.shift
        if self.pad_first:
            if any(side <= w for side, w in zip(grid, self.window, strict=True)):
                by = (0,) * len(by)
            x = shift(pad(x, self.window), by)
        else:
            x = pad(shift(x, by), self.window)
        padded = x.shape[1:-1]
        windows = partition(x, self.window)  # [B, W, L, D]
        mask = shift_mask(padded, self.window, by)
        q, k, v = self.q(windows), self.k(windows), self.v(windows)
        y = self.out(window_attention(q, k, v, self.relative_bias(), mask))
        y = reverse(y, self.window, padded)
        back = tuple(-step for step in by)
        return crop(shift(y, back), grid) if self.pad_first else shift(crop(y, grid), back)


class PatchMerging(nn.Module):
    """Four neighbours become one: [B, h, w, D] to [B, h / 2, w / 2, 2 D], rounded up.

    Their channels stand side by side in the order of columns: upper left, lower left, upper right,
    lower right.
    """

    width: int
    norm_eps: float

    def setup(self) -> None:
        self.norm = LayerNorm(self.norm_eps)
        self.proj = dense(4 * self.width, 2 * self.width)

    def __call__(self, x: Array) -> Array:
        x = pad(x, (2, 2))
        batch, height, width, d = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, d).transpose(0, 1, 3, 4, 2, 5)
        return self.proj(self.norm(x.reshape(batch, height // 2, width // 2, 4 * d)))


class Swin(nn.Module):
    """Patches, and stages of layers with windows.

    `features.tokens` are the last stage's outputs after the final norm, rows first;
    `features.pyramid` those of all stages, before it, and `features.taps[k]` those of stage k, as
    tokens.
    """

    config: SwinConfig

    def setup(self) -> None:
        c = self.config
        self.patch = PatchEmbed(c.patch_size, c.first_width, c.channels)
        self.patch_norm = LayerNorm(c.norm_eps)
        self.merges = [PatchMerging(width, c.norm_eps) for width in c.widths[:-1]]
        self.stages = [Repeat(self._blocks(i), depth) for i, depth in enumerate(c.depths)]
        self.final_norm = LayerNorm(c.norm_eps)

    def _blocks(self, stage: int) -> tuple[SwinBlock, ...]:
        """The layers of a stage, which take turns: plain and, where there is room, shifted."""
        c, width, side = self.config, self.config.widths[stage], self.config.sides[stage]
        shifts = (0, c.window // 2) if side > c.window else (0,)
        return tuple(
            SwinBlock(
                width=width,
                num_heads=c.num_heads[stage],
                mlp_dim=int(width * c.mlp_ratio),
                window=(min(side, c.window),) * 2,
                shift=(by, by),
                norm_eps=c.norm_eps,
                pad_first=c.pad_first,
                parent=None,
            )
            for by in shifts
        )

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised, of any size: zeros at the right and the bottom fill it
            up to whole patches. Leading axes are free.
          train: whether paths are dropped, by the random stream "dropout".
          taps: stages whose output to return as tokens, from 1.

        Raises:
          ValueError: another number of channels, no floats, or a stage that the tower does not
            have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels)
        x = jnp.asarray(pixels).reshape(-1, *pixels.shape[-3:]).astype(c.dtype)
        x = pad(x, (c.patch_size,) * 2)
        grid = tuple(side // c.patch_size for side in x.shape[1:3])
        x = self.patch_norm(self.patch(x)).reshape(-1, *grid, c.first_width)  # [B, h, w, D]
        rates, pyramid = drop_path_stages(c.depths, c.drop_path), []
        for number, (stage, rate) in enumerate(zip(self.stages, rates, strict=True)):
            if number:
                x = self.merges[number - 1](x)
            x = stage(x, train=train, each={"rate": rate})
            pyramid.append(x.reshape(*lead, *x.shape[1:]))
        last = self.final_norm(pyramid[-1])
        return pyramid_features(tuple(pyramid), taps, last=last)


TIMM: Names = {
    "attn_norm": "norm1",
    ("q", "k", "v"): "attn.qkv",
    "relative_bias": "attn.relative_position_bias_table",
    "out": "attn.proj",
    "mlp_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
"""Keys of a layer in the files of timm and in the official ones."""

TRANSFORMERS: Names = {
    "attn_norm": "layernorm_before",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "relative_bias": "attention.self.relative_position_bias_table",
    "out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
"""The same in the files of the Hugging Face hub."""


def swin_table(
    config: SwinConfig,
    *,
    patch: tuple[str, str] = ("patch_embed.proj", "patch_embed.norm"),
    layer: str = "layers.{stage}.blocks.{{}}.",
    names: Names = TIMM,
    merge: str = "layers.{stage}.downsample.",
    merge_from: int = 0,
    final: str = "norm",
) -> Table:
    """Keys of a tower; by default those of the official files.

    Args:
      config: of the tower.
      patch: keys of the patch embedding and of the norm after it.
      layer: the prefix of a layer's keys, with `{stage}` and `{{}}` for the layer's number.
      names: keys of the parts of a layer.
      merge: the prefix of a merging, with `{stage}`.
      merge_from: the stage that the first merging belongs to: 0 where it ends one, 1 where it
        begins one.
      final: key of the norm at the end.
    """
    rows: list[AnyRow] = [
        *weight_rows("patch", patch[0], conv),
        *norm_rows("patch_norm", patch[1]),
        *norm_rows("final_norm", final),
    ]
    for stage, depth in enumerate(config.depths):
        at, steps = layer.format(stage=stage), tuple(range(depth))
        for parts, key in names.items():
            rows += _layer_rows(f"stages_{stage}/layers/", parts, at + key, steps)
        if stage:
            theirs = merge.format(stage=stage - 1 + merge_from)
            rows += norm_rows(f"merges_{stage - 1}/norm", f"{theirs}norm")
            rows += weight_rows(f"merges_{stage - 1}/proj", f"{theirs}reduction", bias=False)
    indices = r".*\.(relative_position_index|attn_mask)"  # which follow from the sizes
    return Table((*rows, Ignored(indices)))


def _layer_rows(
    ours: str, parts: str | tuple[str, ...], key: str, steps: tuple[int, ...]
) -> list[AnyRow]:
    """Rows of a part of a layer, or of several that are one tensor of theirs."""
    if isinstance(parts, tuple):
        kernels, biases = (tuple(f"{ours}{part}/{leaf}" for part in parts) for leaf in _LEAVES)
        fused = len(parts)
        return [
            Row(kernels, f"{key}.weight", split(fused, linear()), steps),
            Row(biases, f"{key}.bias", split(fused, flat), steps),
        ]
    if parts == "relative_bias":
        return [Row(f"{ours}relative_bias/table", key, steps=steps)]
    if parts.endswith("_norm"):
        return norm_rows(ours + parts, key, steps=steps)
    return [*weight_rows(ours + parts, key, linear(2 if parts == "out" else 1), steps=steps)]


_LEAVES = ("kernel", "bias")
