"""VWFormer: a segmentation decoder in which windows attend to contexts of several sizes.

The three coarse levels of a pyramid become one map; each of its 8 x 8 windows attends to contexts
2, 4 and 8 times as wide, at the price of plain windows; the finest level adds detail. The head
takes any pyramid with strides of 4, 8, 16 and 32 (`Features.pyramid`); as a pixel decoder
(`.pixels`) it ends in features instead of classes.

Follows: arXiv:2404.16573.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from zoo.models.core.card import Card
from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import (
    AnyRow,
    Row,
    Table,
    Transform,
    conv,
    flat,
    linear,
    norm_rows,
    split,
    weight_rows,
)
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch, Features
from zoo.models.dense.vwformer.levels import LEVELS, level_inputs, levels_of
from zoo.models.dense.vwformer.pixels import VWPixelsConfig, pixels_table
from zoo.models.parts.assemblies.classifier import image_inputs
from zoo.models.parts.layers.conv import Conv, ConvNormAct
from zoo.models.parts.layers.gates import drop_examples
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.resize import resize_bilinear, resize_nearest
from zoo.models.parts.layers.varying_window import SIDE, VaryingWindow, check_map

CARD = Card(
    slug="vwformer",
    paper="arXiv:2404.16573",
    code="https://github.com/yan-hao-tian/VW",
    differs=(
        "In training, batch statistics are those of the whole batch over all devices.",
        "Of the forms for MaskFormer and Mask2Former the pixel decoders are here, not what reads "
        "them; a bias before a batch norm is a part of its mean.",
    ),
)

Form = Literal["mixed", "city"]
"""Of the official heads: `VWHead` (ADE20K) and `VWCityHead` (Cityscapes)."""


@dataclass(frozen=True)
class VWFormerConfig(ModelConfig):
    """Sizes of the head.

    Attributes:
      widths: channels of the four levels, the finest first.
      width: E of the decoder, a multiple of the squares of all `ratios`.
      num_classes: outputs.
      form: "mixed" has linear maps of the levels, a branch for the mean of the map, and norms after
        attention; "city" has convolutions with norms, enlarges levels by repetition, and has the
        plain attention of torch.
      ratios: how much wider contexts are than windows.
      num_heads: attention heads.
      skip: whether a branch adds the map that it reads.
      detail: channels of the finest level.
      dropout: in training, the share of channels that the last map loses.
      image_size: side in pixels of the images whose pyramid `inputs` describes.
      dtype: in which activations are computed.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    width: int = 512
    num_classes: int = 150
    form: Form = "mixed"
    ratios: tuple[int, ...] = (2, 4, 8)
    num_heads: int = 1
    skip: bool = True
    detail: int = 48
    dropout: float = 0.1
    image_size: int = 512
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.widths) != len(LEVELS):
            raise ValueError(f"widths = {self.widths}: want those of {len(LEVELS)} levels")
        if self.form not in get_args(Form):
            raise ValueError(f"form = {self.form!r}: want one of {', '.join(get_args(Form))}")
        if any(ratio < 1 or ratio > SIDE or self.width % ratio**2 for ratio in self.ratios):
            raise ValueError(
                f"ratios = {self.ratios} with width = {self.width}: want 1 to {SIDE}, whose "
                "squares divide the width"
            )
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: want a divisor of {self.width}")
        if self.image_size % (8 * SIDE):
            raise ValueError(f"image_size = {self.image_size}: want a multiple of {8 * SIDE}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: want 0 <= dropout < 1")

    def build(self) -> "VWFormer":
        """The module."""
        return VWFormer(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of the pyramids of a batch of images."""
        return level_inputs(batch_size, self.image_size, self.widths)


@struct.dataclass
class Segmented:
    """What the head returns.

    Attributes:
      logits: float32 [B, h, w, K], at the resolution of the finest level.
      fused: [B, h / 2, w / 2, E], the coarse levels as one map, which windows attend on.
      decoded: the map after attention, likewise.
      features: of the tower, where there is one.
    """

    logits: Array
    fused: Array
    decoded: Array
    features: Features | None = None


class VWFormer(nn.Module):
    """The head on a pyramid."""

    config: VWFormerConfig

    def setup(self) -> None:
        c, one = self.config, (1, 1)
        mixed = c.form == "mixed"
        outs = (c.detail, *(c.width,) * 3)
        if mixed:
            self.levels = [
                dense(a, b, bias=True, axes=("embed", "mlp"))
                for a, b in zip(c.widths, outs, strict=True)
            ]
            self.pool = ConvNormAct(c.width, one)
        else:
            self.levels = [ConvNormAct(b, one) for b in outs]
        self.fuse = ConvNormAct(c.width, one)
        self.short = ConvNormAct(c.width, one)
        self.branches = [
            VaryingWindow(
                c.width, ratio, c.num_heads, out_kind="norm" if mixed else "bias", skip=c.skip
            )
            for ratio in c.ratios
        ]
        self.join = ConvNormAct(c.width, one)
        self.refine = ConvNormAct(c.width, one)
        self.head = Conv(c.num_classes, one)

    def __call__(self, batch: Batch, *, train: bool = False) -> Segmented:
        """Judge every place of images by their pyramids.

        Args:
          batch: `c1` to `c4` [B, h_i, w_i, C_i]; the sides of `c2` are multiples of 8.
          train: whether channels are dropped, by the random stream "dropout", and batch statistics
            are those of the batch.

        Raises:
          ValueError: levels that do not fit.
        """
        c = self.config
        c1, *coarse = levels_of(batch, c.widths, c.dtype)
        fused = self.merge(coarse, train=train)
        check_map(fused)
        decoded = self.decode(fused, train=train)
        up = resize_bilinear(decoded, *c1.shape[1:3])
        x = jnp.concatenate([up, self.level(0, c1, train=train)], -1)
        x = self.refine(x, train=train)
        if train and c.dropout:
            each = jnp.moveaxis(x, -1, 1)
            each = each.reshape(-1, *each.shape[2:])  # a channel of an image is left out or not
            each = drop_examples(each, c.dropout, self.make_rng("dropout"))
            x = jnp.moveaxis(each.reshape(x.shape[0], x.shape[-1], *x.shape[1:3]), 1, -1)
        return Segmented(self.head(x).astype(jnp.float32), fused, decoded)

    def level(self, number: int, x: Array, *, train: bool) -> Array:
        """A level with the decoder's channels."""
        of = self.levels[number]
        return of(x) if self.config.form == "mixed" else of(x, train=train)

    def merge(self, coarse: list[Array], *, train: bool) -> Array:
        """Levels 2 to 4 as one map [B, h, w, E] at the resolution of level 2."""
        sides = coarse[0].shape[1:3]
        resize = resize_bilinear if self.config.form == "mixed" else resize_nearest
        maps = [resize(self.level(n, x, train=train), *sides) for n, x in enumerate(coarse, 1)]
        return self.fuse(jnp.concatenate(maps[::-1], -1), train=train)

    def decode(self, x: Array, *, train: bool) -> Array:
        """All branches of a map, joined."""
        found = [self.short(x, train=train)]
        if self.config.form == "mixed":
            mean = self.pool(x.mean((1, 2), keepdims=True), train=train)
            found.append(jnp.broadcast_to(mean, x.shape))
        found += [branch(x, train=train) for branch in self.branches]
        return self.join(jnp.concatenate(found, -1), train=train)


@dataclass(frozen=True)
class SegmenterConfig(ModelConfig):
    """Any tower with four stages at strides of 4, 8, 16 and 32, and the head.

    Attributes:
      tower: its configuration, with `widths`.
      head: sizes of the decoder, whose `widths` are the tower's.
    """

    tower: Any
    head: VWFormerConfig = field(default_factory=VWFormerConfig)

    def __post_init__(self) -> None:
        if tuple(self.tower.widths) != self.head.widths:
            raise ValueError(
                f"head.widths = {self.head.widths}: want those of the tower, {self.tower.widths}"
            )

    def build(self) -> "Segmenter":
        """The module."""
        return Segmenter(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch of images."""
        return image_inputs(self.tower, batch_size)


class Segmenter(nn.Module):
    """A tower and the head on its pyramid."""

    config: SegmenterConfig

    def setup(self) -> None:
        self.tower = self.config.tower.build()
        self.head = self.config.head.build()

    def __call__(self, batch: Batch, *, train: bool = False) -> Segmented:
        """Segment images: `pixels` [B, H, W, C] with sides that are multiples of 64."""
        features = self.tower(batch["pixels"], train=train)
        levels = dict(zip(LEVELS, features.pyramid, strict=True))
        return self.head(levels, train=train).replace(features=features)


def _heads_conv(num_in: int) -> Transform:
    """Their 1 x 1 convolution [out, in, 1, 1], our map from or to heads."""
    plain = linear(num_in)
    return Transform(
        f"heads_conv({num_in})",
        lambda theirs, shapes: plain.load([theirs[0][:, :, 0, 0]], shapes),
        lambda ours: [plain.save(ours)[0][:, :, None, None]],
    )


def table(config: VWFormerConfig | VWPixelsConfig) -> Table:
    """Keys of the official head, below `decode_head.`, or of a pixel decoder."""
    if isinstance(config, VWPixelsConfig):
        return pixels_table(config)
    rows: list[AnyRow] = weight_rows("head", "conv_seg", conv)

    def block(ours: str, theirs: str) -> None:
        rows.append(Row(f"{ours}/conv/kernel", f"{theirs}.conv.weight", conv))
        rows.extend(norm_rows(f"{ours}/norm", f"{theirs}.bn", stats=True))

    names = {"fuse": "linear_fuse", "short": "short_path", "join": "cat"}
    names |= {"refine": "low_level_fuse"}
    mixed = config.form == "mixed"
    if mixed:
        names["pool"] = "image_pool.1"
    for ours, theirs in names.items():
        block(ours, theirs)
    for level in range(len(LEVELS)):
        if mixed:
            rows += weight_rows(f"levels_{level}", f"linear_c{level + 1}.proj")
        else:
            block(f"levels_{level}", f"linear_c{level + 1}")
    for number in range(len(config.ratios)):
        ours, theirs = f"branches_{number}", f"attn.{number}"
        block(f"{ours}/shrink", f"ds.{number}")
        if mixed:
            for name, key in (("q", "theta"), ("k", "phi"), ("v", "g")):
                rows += weight_rows(f"{ours}/{name}", f"{theirs}.{key}.conv", _heads_conv(1))
            out = Row(f"{ours}/out/kernel", f"{theirs}.conv_out.conv.weight", _heads_conv(2))
            rows += [out, *norm_rows(f"{ours}/out_norm", f"{theirs}.conv_out.bn", stats=True)]
        else:
            kernels, biases = (
                tuple(f"{ours}/{name}/{leaf}" for name in "qkv") for leaf in ("kernel", "bias")
            )
            rows.append(Row(kernels, f"{theirs}.in_proj_weight", split(3, linear())))
            rows.append(Row(biases, f"{theirs}.in_proj_bias", split(3, flat)))
            rows += weight_rows(f"{ours}/out", f"{theirs}.out_proj", linear(2))
    return Table(tuple(rows)).with_stats()


_WIDTHS = {
    "t": (96, 192, 384, 768),
    "b": (128, 256, 512, 1024),
    "l": (192, 384, 768, 1536),
}


def city(widths: tuple[int, ...], **changes: Any) -> VWFormerConfig:
    """The head for Cityscapes."""
    sizes = {"num_classes": 19, "num_heads": 16} | changes
    return VWFormerConfig(widths, form="city", skip=False, **sizes)


VARIANTS = {
    **{f"vwformer_{size}": VWFormerConfig(widths) for size, widths in _WIDTHS.items()},
    **{f"vwformer_{size}.city": city(widths) for size, widths in _WIDTHS.items()},
    # Pixel decoders, on the channels of Swin.
    **{f"vwformer_{size}.maskformer": VWPixelsConfig(widths) for size, widths in _WIDTHS.items()},
    **{
        f"vwformer_{size}.mask2former": VWPixelsConfig(widths, skip=False, scales=True)
        for size, widths in _WIDTHS.items()
    },
    "vwformer_tiny": VWFormerConfig(
        (4, 6, 8, 10), width=16, num_classes=3, ratios=(2, 4), detail=4, image_size=128
    ),
}


register(CARD, VARIANTS, table=table)
