"""Metrics of what has a value for every pixel."""

import numpy as np

from zoo.models.core.errors import UsageError


def psnr(
    image: np.ndarray, target: np.ndarray, *, peak: float = 1.0, border: int = 0
) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels, `10 log10(peak² / mean squared error)`.

    Args:
      image: [..., H, W, C].
      target: of the same shape.
      peak: the largest value that a pixel may have: 1 for floating point, 255 for bytes.
      border: pixels at every edge that do not count; work on super-resolution leaves out as many as
        the factor.

    Returns:
      [...], one value for each picture over all of its channels; infinite where both are equal.

    Raises:
      UsageError: two shapes, or nothing left within the border.
    """
    if image.shape != target.shape or image.ndim < 3:
        raise UsageError(
            f"image {image.shape} and target {target.shape}: want both [..., H, W, C] and alike"
        )
    if border < 0 or 2 * border >= min(image.shape[-3:-1]):
        raise UsageError(f"border = {border} leaves nothing of a picture of {image.shape[-3:-1]}")
    inside = slice(border, -border or None)
    error = image.astype(np.float64) - target.astype(np.float64)
    error = error[..., inside, inside, :]
    with np.errstate(divide="ignore"):
        decibels: np.ndarray = -10 * np.log10(np.mean(error**2, (-3, -2, -1)) / peak**2)
    return decibels
