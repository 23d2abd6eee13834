"""Resampling of grids with the arithmetic of `torch.nn.functional.interpolate` (`jax.image`
differs).
"""

import functools

import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array

_A = -0.75  # the cubic of torch; Pillow and jax.image use -0.5


@functools.lru_cache(maxsize=64)
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """The linear map of one axis, float32 [size_out, size_in]: half-pixel centres, clamped edges,
    no antialias.
    """
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centre)
    matrix = np.zeros((size_out, size_in), np.float64)
    for tap in range(-1, 3):
        x = np.abs(centre - first - tap)
        near = ((_A + 2) * x - (_A + 3)) * x * x + 1
        far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        index = np.clip(first + tap, 0, size_in - 1).astype(int)
        np.add.at(matrix, (np.arange(size_out), index), weight)
    matrix.setflags(write=False)
    return matrix.astype(np.float32)


def resize_bicubic(x: Array, height: int, width: int) -> Array:
    """Resize [..., h, w, D] to [..., height, width, D], as torch's bicubic with
    `align_corners=False`.
    """
    if x.shape[-3:-1] == (height, width):
        return x
    rows, columns = bicubic_matrix(x.shape[-3], height), bicubic_matrix(x.shape[-2], width)
    y = jnp.einsum("ph,...hwd,qw->...pqd", rows, x.astype(jnp.float32), columns)
    return y.astype(x.dtype)
