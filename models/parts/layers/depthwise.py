"""Convolutions that filter every channel by itself, on a CPU as sums over the places of the kernel.

XLA's kernels for CPUs convolve such channels one by one. A sum over shifted grids is one loop over
memory, 30 to 100 times as fast forwards (`benchmarks/vision_speed.py`). Elsewhere XLA convolves.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zoo.models.core.types import Array


@dataclass(frozen=True)
class Filters:
    """How a kernel [*sides, C / groups, D] goes over a grid [B, *grid, C].

    Attributes:
      strides, padding, dilation: one number for each axis of the grid.
      groups: of channels, each seen by its own filters.
    """

    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Array, kernel: Array) -> Array:
        """[B, *grid, D], as XLA convolves."""
        letters = "DHW"[-len(self.strides) :]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=self.strides,
            padding=[(p, p) for p in self.padding],
            rhs_dilation=self.dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=self.groups,
        )

    def by_taps(self, x: Array, kernel: Array) -> Array:
        """The same where groups are single channels, summed in float32."""
        y = _sum_of_taps(self._around(x, kernel), kernel, self.strides, self.dilation)
        return y.astype(x.dtype)

    def gradients_by_taps(self, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        """From the gradient of `by_taps` those of grid and kernel."""
        spread = [
            (d * (k - 1) - p, n - (m - 1) * s - 1 + p, s - 1)
            for n, m, k, s, p, d in zip(
                x.shape[1:-1],
                dy.shape[1:-1],
                kernel.shape,
                self.strides,
                self.padding,
                self.dilation,
            )
        ]
        ones = (1,) * len(spread)
        wide = jax.lax.pad(dy.astype(jnp.float32), 0.0, [(0, 0, 0), *spread, (0, 0, 0)])
        flipped = jnp.flip(kernel, tuple(range(len(spread))))
        dx = _sum_of_taps(wide, flipped, ones, self.dilation)
        dx = dx.reshape(*x.shape, -1).sum(-1)

        around, axes = self._around(x, kernel), tuple(range(len(spread) + 1))
        spans = [(m - 1) * s + 1 for m, s in zip(dy.shape[1:-1], self.strides, strict=True)]
        sizes, steps = (len(x), *spans, dy.shape[-1]), (1, *self.strides, 1)

        def at(place: Array) -> Array:
            begin = (0, *(place[i] * d for i, d in enumerate(self.dilation)), 0)
            seen = jax.lax.dynamic_slice(around, begin, sizes)
            return (jax.lax.slice(seen, (0,) * len(sizes), sizes, steps) * dy).sum(axes)

        places = jnp.array(list(itertools.product(*map(range, kernel.shape[:-2]))))
        return dx.astype(x.dtype), jax.lax.map(at, places).reshape(kernel.shape).astype(
            kernel.dtype
        )

    def _around(self, x: Array, kernel: Array) -> Array:
        """The grid in float32 with its zeros around, channels as often as they are filtered."""
        zeros = [(0, 0), *((p, p) for p in self.padding), (0, 0)]
        return jnp.pad(
            jnp.repeat(x.astype(jnp.float32), kernel.shape[-1] // x.shape[-1], -1), zeros
        )


def _sum_of_taps(
    x: Array, kernel: Array, strides: tuple[int, ...], dilation: tuple[int, ...]
) -> Array:
    """Float32 [B, *grid, D] of a padded grid [B, ..., D] and a kernel [*sides, 1, D]."""
    spans = [
        n - d * (k - 1) for n, k, d in zip(x.shape[1:-1], kernel.shape, dilation, strict=False)
    ]
    total: Array | float = 0.0
    for place in itertools.product(*map(range, kernel.shape[:-2])):
        begin = (0, *(i * d for i, d in zip(place, dilation, strict=True)), 0)
        end = [b + n for b, n in zip(begin, (len(x), *spans, x.shape[-1]), strict=True)]
        seen = jax.lax.slice(x, begin, end, (1, *strides, 1))
        total = total + seen * kernel[place][0].astype(jnp.float32)
    return jnp.asarray(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def each_filtered(filters: Filters, x: Array, kernel: Array) -> Array:
    """[B, *grid, D] of a grid [B, *grid, C] and a kernel [*sides, 1, D], with C groups."""
    return jax.lax.platform_dependent(x, kernel, cpu=filters.by_taps, default=filters)


def _forward(filters: Filters, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return each_filtered(filters, x, kernel), (x, kernel)


def _backward(filters: Filters, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    def by_xla(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(filters, x, kernel)[1](dy)

    return jax.lax.platform_dependent(*kept, dy, cpu=filters.gradients_by_taps, default=by_xla)


each_filtered.defvjp(_forward, _backward)
