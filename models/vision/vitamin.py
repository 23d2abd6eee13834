"""ViTamin: a vision transformer on a convolutional foot, made for learning from captions.

Two stages of inverted bottlenecks with LayerNorms bring the picture down to an eighth of its sides,
a strided convolution makes tokens of 16 x 16 pixels of it, and a plain transformer with gated MLPs
and without a class token follows. An MLP norms what the layer has normed already.

Follows: arXiv:2404.02132.
"""

from dataclasses import dataclass
from typing import Any

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
from zoo.models.core.types import Array, Features, Memory, Stream
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.conv import Conv, depthwise
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.vit import (
    TIMM_LAYER,
    Names,
    PositionResize,
    ViT,
    ViTBlock,
    ViTConfig,
    fused_layer_rows,
    layer_rows,
    ones,
)

CARD = Card(
    slug="vitamin",
    paper="arXiv:2404.02132",
    code="https://github.com/Beckschen/ViTamin",
    differs=(
        "Images of other sizes resize the position table in every call; the official code does so "
        "once, when a checkpoint is loaded for another size.",
    ),
)


@dataclass(frozen=True)
class ViTaminConfig(ViTConfig):
    """A `ViTConfig`, whose patches of 16 pixels become tokens by convolutions. The defaults are
    ViTamin-L at 224 pixels.

    Attributes:
      stem_width: channels of the first two convolutions.
      stage_widths: channels of the two stages.
      stage_depths: their blocks; the first of each halves the resolution.
      positions: whether there is a position table.
      pool_norm: `Features.cls` is the mean of the tokens after a norm of its own, as a dual encoder
        wants it.
    """

    image_size: int = 224
    patch_size: int = 16
    depth: int = 31
    mlp_dim: int = 2048
    activation: str = "gelu"
    norm_eps: float = 1e-6
    class_token: bool = False
    input_norm: bool = False
    final_norm: bool = False
    gated: bool = True
    position_resize: PositionResize | None = "bicubic_antialias"
    stem_width: int = 160
    stage_widths: tuple[int, int] = (160, 320)
    stage_depths: tuple[int, int] = (2, 4)
    positions: bool = True
    pool_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size != 16:
            raise ValueError(f"patch_size = {self.patch_size}: want 16, that of the convolutions")
        if min(self.stage_depths) < 1:
            raise ValueError(f"stage_depths = {self.stage_depths}: want 1 or more")
        if self.class_token or self.registers:
            raise ValueError("class_token and registers: these transformers have none")

    def block_type(self) -> type[ViTBlock]:
        """The class of the layers."""
        return ViTaminBlock

    def build(self) -> "ViTamin":
        """The module."""
        return ViTamin(self)


class ViTaminBlock(ViTBlock):
    """A layer whose MLP norms its input once more."""

    def setup_mlp(self) -> None:
        """The parts of the MLP, and its norm."""
        super().setup_mlp()
        self.inner_norm = LayerNorm(self.norm_eps)

    def feed_forward(self, stream: Stream, memory: Memory) -> Array:
        """The MLP branch [B, L, D]."""
        x, t = self.inner_norm(self.mlp_norm(stream.hidden)), stream.tokens
        gate = ACTIVATIONS[self.activation](self.project("gate", x, t, memory))
        return self.project("down", gate * self.project("up", x, t, memory), t, memory)


class MBConv(nn.Module):
    """`shortcut(x) + reduce(gelu(filter(gelu(expand(norm(x))))))` on grids [B, h, w, C].

    The shortcut of a block that halves the resolution is the mean of 3 x 3 places, as many of them
    as are in the picture; where widths differ a linear map follows.

    Attributes:
      entering: channels that come in.
      width: channels that go out.
      stride: 1 or 2.
    """

    entering: int
    width: int
    stride: int = 1

    def setup(self) -> None:
        hidden = (4 * self.width + 4) // 8 * 8
        self.norm = LayerNorm(1e-6)
        self.expand = dense(self.entering, hidden, bias=True)
        self.filter = depthwise(hidden, 3, stride=self.stride)
        self.reduce = dense(hidden, self.width, bias=True, axes=("mlp", "embed"))
        if self.entering != self.width:
            self.shortcut = dense(self.entering, self.width, bias=True)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, h, w, C] to the grid of the stride; `train` changes nothing."""
        del train
        gelu = ACTIVATIONS["gelu"]
        y = self.reduce(gelu(self.filter(gelu(self.expand(self.norm(x))))))
        if self.stride > 1:
            around = ((1, 1), (1, 1))
            x = nn.avg_pool(x, (3, 3), (self.stride,) * 2, around, count_include_pad=False)
        return y + (self.shortcut(x) if self.entering != self.width else x)


class ConvFoot(nn.Module):
    """A stem, two stages and a strided convolution: pixels [B, 16 h, 16 w, C] to tokens
    [B, h w, D].
    """

    config: ViTaminConfig

    def setup(self) -> None:
        c = self.config
        self.stem = Conv(c.stem_width, 3, 2)
        self.stem_norm = LayerNorm(1e-6)
        self.stem_out = Conv(c.stem_width, 3)
        before = (c.stem_width, c.stage_widths[0])
        pairs = zip(before, c.stage_widths, strict=True)
        self.first = [MBConv(entering, width, 2) for entering, width in pairs]
        self.rest = [
            Repeat(MBConv(width, width, parent=None), depth - 1)
            for width, depth in zip(c.stage_widths, c.stage_depths, strict=True)
        ]
        self.norm = LayerNorm(1e-6)
        self.out = Conv(c.width, 3, 2)

    def grids(self, pixels: Array) -> tuple[Array, ...]:
        """What the stem and each stage make, at halves, quarters and eighths of the sides."""
        x = self.stem_out(ACTIVATIONS["gelu"](self.stem_norm(self.stem(pixels))))
        found = [x]
        for first, rest in zip(self.first, self.rest, strict=True):
            x = first(x)
            x = rest(x) if rest.depth else x
            found.append(x)
        return tuple(found)

    def __call__(self, pixels: Array) -> Array:
        """The tokens, rows first."""
        check_pixels(pixels, channels=self.config.channels, multiple=16)
        x = self.out(self.norm(self.grids(pixels)[-1]))
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ViTamin(ViT):
    """A `ViT` with other tokens, and perhaps without positions."""

    config: ViTaminConfig

    def setup(self) -> None:
        c = self.config
        self.patch = ConvFoot(c)
        if c.positions:
            table = nn.with_logical_partitioning(self._first_positions, ("positions", "embed"))
            self.position = self.param("position", table)
        else:
            self.position = jnp.zeros((c.grid[0] * c.grid[1], c.width))
        self.stack = Stack(c.plan(), remat=c.remat)
        if c.final_norm:
            self.final_norm = LayerNorm(c.norm_eps)
        if c.pool_norm:
            self.pool_norm = LayerNorm(c.norm_eps)

    def __call__(self, pixels: Array, **options: Any) -> Features:
        """As `ViT`, whose options these are."""
        features = super().__call__(pixels, **options)
        if not self.config.pool_norm:
            return features
        return features.replace(cls=self.pool_norm(features.tokens.mean(-2)))


def _classes(tower: ViTaminConfig, num_classes: int) -> ClassifierConfig:
    return ClassifierConfig(tower, "mean", num_classes=num_classes, head_norm="layer")


def _text(width: int, num_heads: int, depth: int = 12) -> TextConfig:
    return TextConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * width,
        activation="gelu",
        pool="highest",
    )


def _pair(tower: dict[str, Any], image_size: int, text: TextConfig) -> DualConfig:
    vision = ViTaminConfig(**tower, image_size=image_size, pool_norm=True)
    return DualConfig(vision=vision, text=text, embedding_dim=text.width)


_SMALL = {
    "stem_width": 64,
    "stage_widths": (64, 128),
    "width": 384,
    "depth": 14,
    "num_heads": 6,
    "mlp_dim": 768,
}
_BASE = {
    "stem_width": 128,
    "stage_widths": (128, 256),
    "width": 768,
    "depth": 14,
    "num_heads": 12,
    "mlp_dim": 1536,
}
_LARGE: dict[str, Any] = {}
_XLARGE = {
    "stem_width": 192,
    "stage_widths": (192, 384),
    "width": 1152,
    "depth": 32,
    "num_heads": 16,
    "mlp_dim": 2304,
    "positions": False,
}
_TINY = {
    "image_size": 32,
    "stem_width": 8,
    "stage_widths": (8, 12),
    "stage_depths": (1, 2),
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 32,
}
_TEXT_L, _TEXT_L2, _TEXT_XL = _text(768, 12), _text(1024, 16, 24), _text(1152, 16, 27)

# Image encoders with the head that maps into the space of their captions; sizes: ViTamin/models and
# open_clip/model_configs of the official code.
VARIANTS = {
    "vitamin_l": _classes(ViTaminConfig(), 768),
    **{f"vitamin_l.{side}": _classes(ViTaminConfig(image_size=side), 768) for side in (256, 336)},
    "vitamin_l.384": _classes(ViTaminConfig(image_size=384), 768),
    "vitamin_l2": _classes(ViTaminConfig(), 1024),
    **{
        f"vitamin_l2.{side}": _classes(ViTaminConfig(image_size=side), 1024)
        for side in (256, 336, 384)
    },
    "vitamin_s": _classes(ViTaminConfig(**_SMALL), 768),
    "vitamin_b": _classes(ViTaminConfig(**_BASE), 768),
    "vitamin_xl.256": _classes(ViTaminConfig(**_XLARGE, image_size=256), 1152),
    "vitamin_xl.336": _classes(ViTaminConfig(**_XLARGE, image_size=336), 1152),
    "vitamin_xl.384": _classes(ViTaminConfig(**_XLARGE, image_size=384), 1152),
    # Dual encoders. A small image tower that learns with a large one's frozen text tower is `ltt`.
    "vitamin_clip_s": _pair(_SMALL, 224, _text(384, 6)),
    "vitamin_clip_s.ltt": _pair(_SMALL, 224, _TEXT_L),
    "vitamin_clip_b": _pair(_BASE, 224, _text(512, 8)),
    "vitamin_clip_b.ltt": _pair(_BASE, 224, _TEXT_L),
    **{
        f"vitamin_clip_{name}.{side}": _pair(_LARGE, side, text)
        for name, text in (("l", _TEXT_L), ("l2", _TEXT_L2))
        for side in (224, 256, 336, 384)
    },
    **{f"vitamin_clip_xl.{side}": _pair(_XLARGE, side, _TEXT_XL) for side in (256, 336, 384)},
    "vitamin_tiny": _classes(ViTaminConfig(**_TINY), 5),
    "vitamin_clip_tiny": DualConfig(
        vision=ViTaminConfig(**_TINY, pool_norm=True),
        text=TextConfig(
            vocab_size=64, max_length=12, width=24, depth=2, num_heads=2, mlp_dim=40, end_id=63
        ),
        embedding_dim=20,
    ),
}

_LAYER: Names = {
    **{parts: key for parts, key in TIMM_LAYER.items() if parts not in ("up", "down")},
    "inner_norm": "mlp.norm",
    "gate": "mlp.w0",
    "up": "mlp.w1",
    "down": "mlp.w2",
}


def tower_table(config: ViTaminConfig) -> Table:
    """Keys of the image encoder in the official files and in timm's."""
    foot = "patch_embed.backbone."
    rows: list[AnyRow] = [
        *weight_rows("patch/stem", f"{foot}stem.conv1", conv),
        *norm_rows("patch/stem_norm", f"{foot}stem.norm1"),
        *weight_rows("patch/stem_out", f"{foot}stem.conv2", conv),
        *norm_rows("patch/norm", f"{foot}pool.norm"),
        *weight_rows("patch/out", f"{foot}pool.proj", conv),
        *layer_rows(config, "blocks.{}.", _LAYER),
    ]
    if config.positions:
        rows.append(Row("position", "pos_embed", ones(1)))
    if config.pool_norm:
        rows += norm_rows("pool_norm", "fc_norm")
    entering = config.stem_width
    for stage, (width, depth) in enumerate(
        zip(config.stage_widths, config.stage_depths, strict=True)
    ):
        theirs = f"{foot}stages.{stage}."
        rows += _block_rows(f"patch/first_{stage}/", f"{theirs}0.", None)
        if entering != width:
            key = f"{theirs}0.shortcut.expand"
            rows += weight_rows(f"patch/first_{stage}/shortcut", key, pointwise)
        if depth > 1:
            ours, steps = f"patch/rest_{stage}/layers/", tuple(range(1, depth))
            rows += _block_rows(ours, f"{theirs}{{}}.", steps)
        entering = width
    return Table(tuple(rows))


def _block_rows(ours: str, theirs: str, steps: tuple[int, ...] | None) -> list[AnyRow]:
    """Rows of inverted bottlenecks."""
    rows = norm_rows(f"{ours}norm", f"{theirs}pre_norm", steps=steps)
    rows += weight_rows(f"{ours}expand", f"{theirs}conv1_1x1", pointwise, steps=steps)
    rows += weight_rows(f"{ours}filter", f"{theirs}conv2_kxk", conv, steps=steps)
    return rows + weight_rows(f"{ours}reduce", f"{theirs}conv3_1x1", pointwise, steps=steps)


def dual_table(config: DualConfig) -> Table:
    """Keys of the official dual encoders, which are those of OpenCLIP."""
    rows: list[AnyRow] = [
        Row("logit_scale", "logit_scale"),
        *weight_rows("image_projection", "visual.head.proj", bias=False),
        Row("text_projection/kernel", "text.text_projection"),
        Row("text/token/embedding", "text.token_embedding.weight"),
        Row("text/position", "text.positional_embedding"),
        *norm_rows("text/final_norm", "text.ln_final"),
        *fused_layer_rows("text/stack/layers", "text.transformer.resblocks.{}.", config.text.depth),
    ]
    tower = tower_table(config.vision).under("vision", "visual.trunk.")
    return tower + Table(tuple(rows))


def table(config: ClassifierConfig | DualConfig) -> Table:
    """Keys of the official files; those of image encoders are timm's too."""
    if isinstance(config, DualConfig):
        return dual_table(config)
    return tower_table(config.tower).under("tower") + head_table(
        config, norm="fc_norm", head="head"
    )


register(CARD, VARIANTS, table=table)
