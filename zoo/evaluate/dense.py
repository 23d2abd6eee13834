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


def confusion(
    guess: np.ndarray, classes: np.ndarray, number: int, *, ignore: int = -100
) -> np.ndarray:
    """How many places of each class are taken for which: int64 [K, K], rows are what is there.

    Counts of several pictures add up.

    Args:
      guess: integers of any shape, from 0 to K - 1.
      classes: of the same shape, likewise or `ignore`.
      number: K.
      ignore: the class of places that do not count.

    Raises:
      UsageError: two shapes, or a class that there is not.
    """
    if guess.shape != classes.shape:
        raise UsageError(f"guess {guess.shape} and classes {classes.shape}: want the same shape")
    counted = classes != ignore
    guess, classes = guess[counted].astype(np.int64), classes[counted].astype(np.int64)
    for name, found in (("guess", guess), ("classes", classes)):
        if found.size and not 0 <= found.min() <= found.max() < number:
            raise UsageError(f"{name}: got {found.min()} to {found.max()}, want 0 to {number - 1}")
    return np.bincount(classes * number + guess, minlength=number**2).reshape(number, number)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, from `confusion`: float64 [K], NaN for classes that
    are neither there nor given. Its `nanmean` is the mean IoU.
    """
    both = np.diag(counts).astype(np.float64)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = both / (counts.sum(0) + counts.sum(1) - both)
    return found


def class_dice(counts: np.ndarray) -> np.ndarray:
    """Twice the intersection by the sum of both, likewise: `2 IoU / (1 + IoU)`."""
    iou = class_iou(counts)
    found: np.ndarray = 2 * iou / (1 + iou)
    return found
