"""Resampling of grids with the arithmetic of `torch.nn.functional.interpolate`, by default with
`align_corners=False` (`jax.image` differs): every method is one matrix per axis.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array

_CUBIC = -0.75  # of torch without antialias; with it, as Pillow and jax.image
_CUBIC_ANTIALIAS = -0.5


def resize_bicubic(x: Array, height: int, width: int, *, antialias: bool = False) -> Array:
    """Resize [..., h, w, D] to [..., height, width, D] with cubic weights.

    Args:
      x: the grid.
      height: rows wanted.
      width: columns wanted.
      antialias: widen the filter where the grid shrinks, and use Pillow's cubic.
    """
    if antialias:
        filtered = functools.partial(_filtered, lambda x: _cubic(x, _CUBIC_ANTIALIAS), 2.0)
        return _resize(x, height, width, filtered)
    return _resize(x, height, width, bicubic_matrix)


def resize_bilinear(
    x: Array, height: int, width: int, *, antialias: bool = False, align_corners: bool = False
) -> Array:
    """Resize [..., h, w, D] to [..., height, width, D] with linear weights; `antialias` widens the
    filter where the grid shrinks, `align_corners` keeps the corners where they are.
    """
    if align_corners:
        return _resize(x, height, width, aligned_matrix)
    if antialias:
        triangle = functools.partial(_filtered, lambda x: np.maximum(1 - np.abs(x), 0), 1.0)
        return _resize(x, height, width, triangle)
    return _resize(x, height, width, bilinear_matrix)


def resize_nearest(x: Array, height: int, width: int) -> Array:
    """Resize [..., h, w, D] to [..., height, width, D] by torch's "nearest" (not "nearest-exact"),
    which rounds down.
    """
    rows, columns = nearest_index(x.shape[-3], height), nearest_index(x.shape[-2], width)
    return x[..., rows, :, :][..., columns, :]


def resize_area(x: Array, height: int, width: int) -> Array:
    """Resize [..., h, w, D] to [..., height, width, D] by means over the cells that a new cell
    touches (torch's "area", its adaptive average pooling).
    """
    return _resize(x, height, width, area_matrix)


@functools.lru_cache(maxsize=64)
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """The linear map of one axis, float32 [size_out, size_in]: half-pixel centres, clamped edges,
    no antialias.
    """
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centre)
    taps = [(first + tap, _cubic(centre - first - tap, _CUBIC)) for tap in range(-1, 3)]
    return _gathered(taps, size_in)


@functools.lru_cache(maxsize=64)
def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """As `bicubic_matrix`, with linear weights."""
    centre = np.maximum((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0)
    first = np.floor(centre)
    return _gathered([(first, 1 - centre + first), (first + 1, centre - first)], size_in)


@functools.lru_cache(maxsize=64)
def aligned_matrix(size_in: int, size_out: int) -> np.ndarray:
    """As `bilinear_matrix`, the first and the last cell staying where they are."""
    centre = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    first = np.floor(centre)
    return _gathered([(first, 1 - centre + first), (first + 1, centre - first)], size_in)


@functools.lru_cache(maxsize=64)
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """The means of one axis, float32 [size_out, size_in]."""
    out = np.arange(size_out)
    start, stop = out * size_in // size_out, -(-(out + 1) * size_in // size_out)
    cell = np.arange(size_in)
    inside = (cell >= start[:, None]) & (cell < stop[:, None])
    return _frozen(inside / inside.sum(1, keepdims=True))


def nearest_index(size_in: int, size_out: int) -> np.ndarray:
    """Which old row each new row copies; in single precision, as torch counts."""
    scale = np.float32(size_in) / np.float32(size_out)
    index = np.floor(np.arange(size_out, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(index, size_in - 1)


def _filtered(
    weight: Callable[[np.ndarray], np.ndarray], radius: float, size_in: int, size_out: int
) -> np.ndarray:
    """Antialiased: `weight`, zero beyond `radius`, stretched by how much the axis shrinks."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(size_out)[:, None] + 0.5)
    cell = np.arange(size_in)
    start = np.maximum(np.trunc(centre - radius * stretch + 0.5), 0)
    stop = np.minimum(np.trunc(centre + radius * stretch + 0.5), size_in)
    matrix = weight((cell + 0.5 - centre) / stretch) * ((cell >= start) & (cell < stop))
    return _frozen(matrix / matrix.sum(1, keepdims=True))


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel with parameter `a`, zero from 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _gathered(taps: list[tuple[np.ndarray, np.ndarray]], size_in: int) -> np.ndarray:
    """The matrix whose row i adds up `weight[i]` at `index[i]` of each tap, clamped to the axis."""
    size_out = len(taps[0][0])
    matrix = np.zeros((size_out, size_in), np.float64)
    for index, weight in taps:
        clamped = np.clip(index, 0, size_in - 1).astype(int)
        np.add.at(matrix, (np.arange(size_out), clamped), weight)
    return _frozen(matrix)


def _frozen(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def _resize(x: Array, height: int, width: int, matrix: Callable[[int, int], np.ndarray]) -> Array:
    """Both axes by their matrices, in float32; untouched where nothing changes."""
    if x.shape[-3:-1] == (height, width):
        return x
    rows, columns = matrix(x.shape[-3], height), matrix(x.shape[-2], width)
    y = jnp.einsum("ph,...hwd,qw->...pqd", rows, x.astype(jnp.float32), columns)
    return y.astype(x.dtype)
