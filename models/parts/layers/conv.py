"""Convolutions over grids of tokens."""

import flax.linen as nn
import jax

from zoo.models.core.types import Array
from zoo.models.parts.layers.linear import fan_in_init


class DepthwiseConv(nn.Module):
    """Every channel filtered by itself, the same size coming out: [B, h, w, D] -> [B, h, w, D]."""

    width: int
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = (None, None, "conv_in", "conv_out")
        init = nn.with_logical_partitioning(fan_in_init((0, 1, 2), (3,)), axes)
        kernel = self.param("kernel", init, (self.size, self.size, 1, self.width))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        bias = self.param("bias", zeros, (self.width,))
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.width,
        )
        return y + bias.astype(y.dtype)
