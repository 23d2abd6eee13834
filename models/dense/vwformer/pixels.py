"""The decoder of VWFormer without classes: features of every place, for MaskFormer and Mask2Former.

One group norm stands behind all maps of the decoder's width.

Follows: arXiv:2404.16573.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import ZooError
from zoo.models.core.keytable import (
    AnyRow,
    Ignored,
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
from zoo.models.core.types import Array, Batch
from zoo.models.dense.vwformer.levels import level_inputs, levels_of
from zoo.models.parts.layers.conv import Conv, ConvNormAct
from zoo.models.parts.layers.norms import GroupNorm
from zoo.models.parts.layers.resize import resize_bilinear, resize_nearest
from zoo.models.parts.layers.varying_window import SIDE, VaryingWindow, check_map


@dataclass(frozen=True)
class VWPixelsConfig(ModelConfig):
    """Sizes of the decoder.

    Attributes:
      widths: channels of the four levels, the finest first.
      width: E, a multiple of `groups` and of the squares of all `ratios`.
      out_width: channels that come out.
      ratios: how much wider contexts are than windows.
      num_heads: attention heads.
      skip: whether a branch adds the map that it reads (MaskFormer).
      scales: whether levels 4, 3 and 2 come out too, with `out_width` channels (Mask2Former).
      detail: channels of the finest level.
      groups: of the group norms.
      image_size: side in pixels of the images whose pyramid `inputs` describes.
      dtype: in which activations are computed.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    width: int = 512
    out_width: int = 256
    ratios: tuple[int, ...] = (2, 4, 8)
    num_heads: int = 16
    skip: bool = True
    scales: bool = False
    detail: int = 48
    groups: int = 32
    image_size: int = 512
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.widths) != 4:
            raise ValueError(f"widths = {self.widths}: want those of 4 levels")
        for name in ("width", "out_width"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"{name} = {getattr(self, name)}: want a multiple of groups = {self.groups}"
                )
        if self.image_size % (8 * SIDE):
            raise ValueError(f"image_size = {self.image_size}: want a multiple of {8 * SIDE}")

    def build(self) -> "VWPixels":
        """The module."""
        return VWPixels(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of the pyramids of a batch of images."""
        return level_inputs(batch_size, self.image_size, self.widths)


@struct.dataclass
class Pixels:
    """What the decoder returns.

    Attributes:
      features: [B, h, w, out_width], at the resolution of the finest level.
      scales: levels 4, 3 and 2 with as many channels, the coarsest first; empty without them.
    """

    features: Array
    scales: tuple[Array, ...] = ()


class VWPixels(nn.Module):
    """The decoder on a pyramid."""

    config: VWPixelsConfig

    def setup(self) -> None:
        c = self.config

        def plain(width: int = c.width) -> Conv:
            return Conv(width, (1, 1), bias=False)

        self.norm = GroupNorm(c.groups)
        self.levels = [plain() for _ in c.widths[1:]]
        self.fuse, self.short, self.pool, self.join = plain(), plain(), plain(), plain()
        self.branches = [
            VaryingWindow(c.width, ratio, c.num_heads, out_kind="bias", skip=c.skip)
            for ratio in c.ratios
        ]
        self.detail = ConvNormAct(c.detail, (1, 1))
        self.refine, self.refine_norm = plain(c.out_width), GroupNorm(c.groups)
        if c.scales:
            self.scales = [plain(c.out_width) for _ in c.widths[1:]]
            self.scale_norms = [GroupNorm(c.groups) for _ in c.widths[1:]]

    def __call__(self, batch: Batch, *, train: bool = False) -> Pixels:
        """Features of every place of images, from their pyramids.

        Args:
          batch: `c1` to `c4` [B, h_i, w_i, C_i]; the sides of `c2` are multiples of 8.
          train: whether batch statistics are those of the batch.

        Raises:
          ValueError: levels that do not fit.
        """
        c1, *coarse = levels_of(batch, self.config.widths, self.config.dtype)
        sides = coarse[0].shape[1:3]
        maps = [
            resize_nearest(self._normed(of(x)), *sides)
            for of, x in zip(self.levels, coarse, strict=True)
        ]
        x = self._normed(self.fuse(jnp.concatenate(maps[::-1], -1)))
        check_map(x)
        mean = self._normed(self.pool(x.mean((1, 2), keepdims=True)))
        found = [self._normed(self.short(x)), jnp.broadcast_to(mean, x.shape)]
        found += [branch(x, train=train) for branch in self.branches]
        x = self._normed(self.join(jnp.concatenate(found, -1)))
        x = resize_bilinear(x, *c1.shape[1:3])
        x = jnp.concatenate([x, self.detail(c1, train=train)], -1)
        x = jax.nn.relu(self.refine_norm(self.refine(x)))
        if not self.config.scales:
            return Pixels(x)
        parts = zip(self.scales, self.scale_norms, coarse, strict=True)
        scales = [jax.nn.relu(norm(of(level))) for of, norm, level in parts]
        return Pixels(x, tuple(scales[::-1]))

    def _normed(self, x: Array) -> Array:
        return jax.nn.relu(self.norm(x))


def _shared(number: int) -> Transform:
    """Theirs has one tensor under several names, all of which are written."""

    def load(theirs: Any, shapes: Any) -> list[np.ndarray]:
        del shapes
        if not all(np.array_equal(each, theirs[0]) for each in theirs):
            raise ZooError("the norm of the decoder's maps is one module, and its tensors differ")
        return [np.asarray(theirs[0])]

    return Transform(f"shared({number})", load, lambda ours: [ours[0]] * number)


def _shift(theirs: Any, shapes: Any) -> list[np.ndarray]:
    del shapes
    bias, mean = theirs
    return [mean - bias]


_shifted = Transform("shifted", _shift, lambda ours: [np.zeros_like(ours[0]), ours[0]])
"""Their bias before a batch norm and its mean, our mean without a bias; written with none."""


def pixels_table(config: VWPixelsConfig) -> Table:
    """Keys of the official pixel decoder of MaskFormer, or with `scales` of Mask2Former, below
    `sem_seg_head.pixel_decoder.`
    """
    end = "_0" if config.scales else ""
    names = {f"levels_{i}": f"linear_c{i + 2}" for i in range(3)} | {"fuse": "linear_fuse"}
    names |= {"short": f"short_path{end}", "pool": f"image_pool{end}.1", "join": f"cat{end}"}
    rows: list[AnyRow] = [Row(f"{o}/kernel", f"{t}.weight", conv) for o, t in names.items()]
    for ours, leaf in (("scale", "weight"), ("bias", "bias")):
        keys = tuple(f"{theirs}.norm.{leaf}" for theirs in names.values())
        rows.append(Row(f"norm/{ours}", keys, _shared(len(keys))))

    def normed(conv_path: str, norm_path: str, theirs: str) -> None:
        rows.append(Row(f"{conv_path}/kernel", f"{theirs}.weight", conv))
        rows.extend(norm_rows(norm_path, f"{theirs}.norm"))

    normed("refine", "refine_norm", "low_level_fuse")
    for i in range(3 if config.scales else 0):
        normed(f"scales_{i}", f"scale_norms_{i}", f"proj.{i}")
    rows.append(Row("detail/conv/kernel", "linear_c1.weight", conv))
    rows += norm_rows("detail/norm", "linear_c1.norm", stats=True)
    for number in range(len(config.ratios)):
        ours, ds, attn = f"branches_{number}", f"ds{end}.{number}", f"attn{end}.{number}"
        rows.append(Row(f"{ours}/shrink/conv/kernel", f"{ds}.weight", conv))
        rows.append(Row(f"{ours}/shrink/norm/scale", f"{ds}.norm.weight"))
        rows.append(Row(f"{ours}/shrink/norm/bias", f"{ds}.norm.bias"))
        mean, keys = f"stats/{ours}/shrink/norm/mean", (f"{ds}.bias", f"{ds}.norm.running_mean")
        rows.append(Row(mean, keys, _shifted))
        rows.append(Row(f"stats/{ours}/shrink/norm/var", f"{ds}.norm.running_var"))
        rows.append(Ignored(rf"{ds}\.norm\.num_batches_tracked"))
        kernels, biases = (
            tuple(f"{ours}/{name}/{leaf}" for name in "qkv") for leaf in ("kernel", "bias")
        )
        rows.append(Row(kernels, f"{attn}.in_proj_weight", split(3, linear())))
        rows.append(Row(biases, f"{attn}.in_proj_bias", split(3, flat)))
        rows += weight_rows(f"{ours}/out", f"{attn}.out_proj", linear(2))
    return Table(tuple(rows)).with_stats()
