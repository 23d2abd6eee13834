"""Convolutions over grids [B, ..., C] of one, two or three axes, channels last.

Padding is that of torch, the same on both sides of an axis at every stride.
"""

import flax.linen as nn

from zoo.models.core.types import Array
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.depthwise import Filters, each_filtered
from zoo.models.parts.layers.linear import fan_in_init
from zoo.models.parts.layers.norms import GridNorm, make_grid_norm

Sizes = int | tuple[int, ...]
"""One number per axis of the grid, or one for all of them."""


class Conv(nn.Module):
    """A convolution [B, *grid, C] -> [B, *grid, D].

    Attributes:
      features: D.
      kernel: sides; a single number means two axes.
      stride: steps.
      padding: zeros on both sides of each axis; None for those with which a stride of 1 keeps the
        size, `dilation * (kernel - 1) // 2`.
      dilation: distance of the taps.
      groups: into how many groups the channels are cut, each seen by its own filters.
      bias: whether there is a bias.
    """

    features: int
    kernel: Sizes
    stride: Sizes = 1
    padding: Sizes | None = None
    dilation: Sizes = 1
    groups: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = (self.kernel,) * 2 if isinstance(self.kernel, int) else self.kernel
        axes, channels = len(kernel), x.shape[-1]
        if x.ndim != axes + 2:
            raise ValueError(f"x: got {x.shape}, want [B, {axes} axes of a grid, C]")
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"{channels} channels to {self.features} in groups = {self.groups}: want multiples"
            )
        dilation = _each(self.dilation, axes)
        if self.padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
        else:
            padding = _each(self.padding, axes)
        shape = (*kernel, channels // self.groups, self.features)
        names = (*(None,) * axes, "conv_in", "conv_out")
        init = fan_in_init(tuple(range(axes + 1)), (axes + 1,))
        weights = self.param("kernel", nn.with_logical_partitioning(init, names), shape)
        filters = Filters(_each(self.stride, axes), padding, dilation, self.groups)
        weights = weights.astype(x.dtype)
        alone = self.groups == channels > 1
        y = each_filtered(filters, x, weights) if alone else filters(x, weights)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            y = y + self.param("bias", zeros, (self.features,)).astype(y.dtype)
        return y


def depthwise(width: int, kernel: Sizes, *, stride: Sizes = 1, bias: bool = True) -> Conv:
    """Every channel filtered by itself."""
    return Conv(width, kernel, stride, groups=width, bias=bias)


class ConvNormAct(nn.Module):
    """A convolution without a bias, a norm with one, an activation.

    Attributes:
      features: channels that come out.
      kernel, stride, padding, dilation, groups: as in `Conv`.
      norm_kind: of the norm `norm`; None for none, and then the convolution has a bias.
      norm_eps: epsilon of the norm.
      activation: a name of `ACTIVATIONS`; None for none.
    """

    features: int
    kernel: Sizes
    stride: Sizes = 1
    padding: Sizes | None = None
    dilation: Sizes = 1
    groups: int = 1
    norm_kind: GridNorm | None = "batch"
    norm_eps: float = 1e-5
    activation: str | None = "relu"

    def setup(self) -> None:
        self.conv = Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.norm_kind is None,
        )
        if self.norm_kind is not None:
            self.norm = make_grid_norm(self.norm_kind, self.norm_eps)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, *grid, C] to [B, *grid, features]."""
        y = self.conv(x)
        if self.norm_kind is not None:
            y = self.norm(y, train=train) if self.norm_kind == "batch" else self.norm(y)
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


def _each(sizes: Sizes, axes: int) -> tuple[int, ...]:
    """One number per axis."""
    sizes = (sizes,) * axes if isinstance(sizes, int) else sizes
    if len(sizes) != axes:
        raise ValueError(f"{sizes}: want one number for each of {axes} axes")
    return sizes
