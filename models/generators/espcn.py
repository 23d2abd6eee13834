"""ESPCN: super-resolution by three convolutions on the small picture and a shuffle of channels into
pixels.

All filtering happens at low resolution; the last convolution has r² channels for every channel of
the picture, which become the r x r pixels of each place. Pictures are luma, or Y, Cb and Cr, in
[0, 1] (`zoo.processors.colour`), of any size.

Follows: arXiv:1609.05158. No official code was released; the numbers are held to what the community
agrees on.
"""

from collections.abc import Collection
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.card import Card
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import Table, conv, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch
from zoo.models.parts.layers.conv import Conv
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.spatial import ChannelOrder, depth_to_space

CARD = Card(
    slug="espcn",
    paper="arXiv:1609.05158",
    differs=(
        "No official code exists: channel order, zero padding and clipping are those that the "
        "PyTorch versions of the community share.",
        "Pictures are clipped to [0, 1] by `upscale` only: the loss has a gradient outside.",
    ),
)

ORDER: ChannelOrder = "channels_first"
"""Where the last convolution has the pixels of a place; it only matters for several channels."""


@dataclass(frozen=True)
class ESPCNConfig(ModelConfig):
    """Sizes of the network; the defaults are the paper's for a factor of 3.

    Attributes:
      factor: r, how much larger pictures become.
      channels: C, of the picture: 1 is luma alone, 3 is Y, Cb and Cr.
      widths: channels after the first and the second convolution.
      kernels: sides of the three convolutions.
      image_size: side of the small pictures that `inputs` describes.
      dtype: in which activations are computed.
    """

    factor: int = 3
    channels: int = 1
    widths: tuple[int, int] = (64, 32)
    kernels: tuple[int, int, int] = (5, 3, 3)
    image_size: int = 17
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.factor < 1 or self.channels < 1:
            raise ValueError(
                f"factor = {self.factor}, channels = {self.channels}: want 1 or more of each"
            )
        if any(side % 2 == 0 for side in self.kernels):
            raise ValueError(f"kernels = {self.kernels}: want odd sides, which keep the size")

    def build(self) -> "ESPCN":
        """The module."""
        return ESPCN(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch of small pictures."""
        shape = (batch_size, self.image_size, self.image_size, self.channels)
        return {"pixels": jax.ShapeDtypeStruct(shape, jnp.float32)}


@struct.dataclass
class SuperResolved:
    """What the network returns.

    Attributes:
      image: [B, r H, r W, C], not clipped.
      cells: [B, H, W, C r²], the same numbers before the shuffle, in the order `ORDER`.
      features: [B, H, W, D] after the second convolution.
    """

    image: Array
    cells: Array
    features: Array


class ESPCN(nn.Module):
    """`shuffle(conv(tanh(conv(tanh(conv(pixels))))))`."""

    config: ESPCNConfig

    def setup(self) -> None:
        c = self.config
        sizes = (*c.widths, c.channels * c.factor**2)
        self.convs = [Conv(size, side) for size, side in zip(sizes, c.kernels, strict=True)]

    def __call__(self, batch: Batch) -> SuperResolved:
        """Enlarge pictures.

        Args:
          batch: `pixels` [B, H, W, C], floating point in [0, 1].

        Raises:
          ValueError: another number of channels, or integers.
        """
        c, pixels = self.config, batch["pixels"]
        check_pixels(pixels, channels=c.channels)
        x = pixels.astype(c.dtype)
        for layer in self.convs[:-1]:
            x = jnp.tanh(layer(x))
        cells = self.convs[-1](x)
        image = depth_to_space(cells, (c.factor, c.factor), ORDER)
        return SuperResolved(image.astype(jnp.float32), cells, x)

    def upscale(self, pixels: Array) -> Array:
        """[B, H, W, C] in [0, 1] to [B, r H, r W, C] in [0, 1]."""
        return jnp.clip(self({"pixels": pixels}).image, 0, 1)


def _sizes(factor: int, channels: int = 1) -> ESPCNConfig:
    """The network for a factor, trained on crops of 17 x 17 small pixels."""
    return ESPCNConfig(factor=factor, channels=channels)


VARIANTS = {
    "espcn_x3": _sizes(3),
    "espcn_x2": _sizes(2),
    "espcn_x4": _sizes(4),
    # Of github.com/Nhat-Thanh/ESPCN-Pytorch, which has weights: Y, Cb and Cr.
    "espcn_x2.ycbcr": _sizes(2, 3),
    "espcn_x3.ycbcr": _sizes(3, 3),
    "espcn_x4.ycbcr": _sizes(4, 3),
    "espcn_tiny": ESPCNConfig(factor=2, widths=(8, 4), image_size=6),
}

LAYOUTS = {
    "feature_maps": ("feature_maps.0", "feature_maps.2", "sub_pixel.0"),
    "conv": ("conv_1", "conv_2", "conv_3"),
    "parts": ("first_part.0", "first_part.2", "last_part.0"),
}
"""Keys of the three convolutions in the layouts that are about."""


def table(config: ESPCNConfig, layout: str = "feature_maps") -> Table:
    """Keys of a PyTorch checkpoint in one of `LAYOUTS`."""
    del config
    parts = enumerate(LAYOUTS[layout])
    return Table(tuple(row for i, key in parts for row in weight_rows(f"convs_{i}", key, conv)))


def layout_of(keys: Collection[str]) -> str:
    """The name of the layout that a checkpoint with these keys has.

    Raises:
      UsageError: none of `LAYOUTS`.
    """
    for name, parts in LAYOUTS.items():
        if f"{parts[0]}.weight" in keys:
            return name
    raise UsageError(
        f"the checkpoint has keys such as {', '.join(sorted(keys)[:3])}: want those of one of the "
        f"layouts {', '.join(' '.join(parts) for parts in LAYOUTS.values())}"
    )


register(CARD, VARIANTS, table=table)
