"""Convolutions that are sums of branches in training and fold into one afterwards.

Follows: arXiv:2101.03697, arXiv:2206.04040.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array
from zoo.models.parts.layers.conv import Conv, ConvNormAct
from zoo.models.parts.layers.norms import BatchNorm

NORM_EPS = 1e-5
"""Of all norms."""

Variables = Mapping[str, Any]


class BranchedConv(nn.Module):
    """`norm(conv(x)) + norm(small conv(x)) + norm(x)`, or one convolution that is all of it.

    Attributes:
      entering: channels that come in.
      features: channels that go out.
      kernel, stride, groups: as in `Conv`.
      small: side of the second kernel; 0 for none.
      one: whether the branches are folded.

    The normed input is there where shapes agree.
    """

    entering: int
    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    small: int = 0
    one: bool = False

    @property
    def keeps_shape(self) -> bool:
        """Whether what comes out has the shape of what goes in."""
        return self.entering == self.features and self.stride == 1

    def setup(self) -> None:
        f, options = self.features, {"stride": self.stride, "groups": self.groups}
        if self.one:
            self.conv = Conv(f, self.kernel, **options)
            return
        self.wide = ConvNormAct(f, self.kernel, activation=None, norm_eps=NORM_EPS, **options)
        if self.small:
            self.narrow = ConvNormAct(f, self.small, activation=None, norm_eps=NORM_EPS, **options)
        if self.keeps_shape:
            self.skip = BatchNorm(NORM_EPS)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, h, w, entering] to [B, h', w', features]."""
        if self.one:
            return self.conv(x)
        y = self.wide(x, train=train)
        if self.small:
            y = y + self.narrow(x, train=train)
        return y + self.skip(x, train=train) if self.keeps_shape else y


def folded(params: Variables, stats: Variables) -> dict[str, Array]:
    """A convolution and the norm after it as one convolution."""
    return scaled(params["conv"]["kernel"], params["norm"], stats["norm"])


def scaled(kernel: Array, norm: Variables, stats: Variables) -> dict[str, Array]:
    """A kernel [..., h, w, i, o] followed by a norm."""
    gain = norm["scale"] * jax.lax.rsqrt(jnp.asarray(stats["var"]) + NORM_EPS)  # [..., o]
    bias = norm["bias"] - stats["mean"] * gain
    return {"kernel": kernel * gain[..., None, None, None, :], "bias": bias}


def joined(params: Variables, stats: Variables) -> dict[str, Array]:
    """The branches of a `BranchedConv` as one convolution."""
    found = folded(params["wide"], stats["wide"])
    kernel = found["kernel"]
    parts = [found]
    if "narrow" in params:
        narrow = folded(params["narrow"], stats["narrow"])
        more = (kernel.shape[-4] - narrow["kernel"].shape[-4]) // 2
        around = [(0, 0)] * (kernel.ndim - 4) + [(more, more)] * 2 + [(0, 0)] * 2
        parts.append({**narrow, "kernel": jnp.pad(narrow["kernel"], around)})
    if "skip" in params:
        parts.append(scaled(identity_kernel(kernel), params["skip"], stats["skip"]))
    return {leaf: sum(part[leaf] for part in parts) for leaf in ("kernel", "bias")}


def identity_kernel(kernel: Array) -> np.ndarray:
    """The kernel of this shape [..., h, w, i, o] that changes nothing."""
    height, width, entering, features = kernel.shape[-4:]
    found = np.zeros(kernel.shape, np.float32)
    output = np.arange(features)
    found[..., height // 2, width // 2, output % entering, output] = 1
    return found
