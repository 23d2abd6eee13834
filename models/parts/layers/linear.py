"""Linear maps: `Proj`, one full-rank kernel with its axis names."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Initializer

from zoo.models.core.types import Array
from zoo.models.parts.layers.operands import contract, joined_inputs


class LinearKernel(nn.LogicallyPartitioned):
    """The box of a linear map's kernel: the names of its axes, and which of them are contracted.

    Attributes:
      num_in: how many axes are contracted; they come before
      num_out: those of the result. Axes before both are those of stacked layers.
    """

    num_in: int = struct.field(default=1, pytree_node=False)
    num_out: int = struct.field(default=1, pytree_node=False)


def fan_in_init(in_axis: tuple[int, ...], out_axis: tuple[int, ...]) -> Initializer:
    """Truncated normal of variance 1 / fan-in.

    The axes are given because Flax guesses wrong for rank > 2.
    """
    return nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis)


class Proj(nn.Module):
    """A linear map `einsum(eq, x, kernel) + bias` whose kernel keeps its full rank.

    Attributes:
      eq: einsum of the input and the kernel, such as "bld,dhe->blhe"; several contracted axes, the
        last of the input and the first of the kernel, are merged into one.
      shape: shape of the kernel, input axes first.
      axes: logical name of every kernel axis.
      num_in: how many leading kernel axes are contracted.
      bias: whether there is a bias, of the shape of the output axes.
      init: kernel initialiser; None for `fan_in_init`.
    """

    eq: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_in: int = 1
    bias: bool = False
    init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rank = len(self.shape)
        init = self.init or fan_in_init(tuple(range(self.num_in)), tuple(range(self.num_in, rank)))

        def boxed(*args: Any) -> LinearKernel:
            num_out = rank - self.num_in
            return LinearKernel(init(*args), self.axes, num_in=self.num_in, num_out=num_out)

        kernel = self.param("kernel", boxed, self.shape)  # an array or an operand
        if self.num_in > 1:  # one long axis, or XLA transposes the kernel in every call
            x = x.reshape(*x.shape[: -self.num_in], -1)
            kernel = joined_inputs(kernel, self.num_in)
        y = contract(self.eq if self.num_in == 1 else "...d,df->...f", x, kernel)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.num_in :])
            y = y + self.param("bias", zeros, self.shape[self.num_in :]).astype(y.dtype)
        return y


def dense(
    width: int, features: int, *, bias: bool = False, axes: tuple[str, str] = ("embed", "mlp")
) -> Proj:
    """`Proj` from the last axis of `width` to one of `features`."""
    return Proj("...d,df->...f", (width, features), axes, bias=bias)


def table_init(width: int) -> Initializer:
    """Normal with standard deviation 1 / sqrt(width), for tables that are added to tokens."""
    return nn.initializers.normal(1 / math.sqrt(width))


def uniform(bound: float) -> Initializer:
    """Uniform between `-bound` and `bound`."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )
