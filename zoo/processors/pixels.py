"""From a picture to normalised pixels, exactly as the processors of published checkpoints do it.

Resizing is Pillow's and works on 8-bit values; what follows is one look-up, because there are only
256 values of a channel. Both are exact: the pixels equal those of the originals to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from zoo.models.core.errors import UsageError, ZooError

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""Filters of Pillow in the order of the numbers that configurations use."""

Size = tuple[int, int]
"""Height and width in pixels."""

LONGEST = 1 << 16
"""A picture that would become longer than this is refused: it has no shape to speak of."""

LARGEST_SQUARE = 1 << 14
"""Side of the largest square that a picture is set into, which takes 800 MB for a moment."""


@dataclass(frozen=True)
class Exactly:
    """Resize to `height` x `width`, whatever the proportions are."""

    height: int
    width: int

    def __call__(self, height: int, width: int) -> Size:
        """The size that a picture of `height` x `width` gets."""
        return self.height, self.width


@dataclass(frozen=True)
class ShortestEdge:
    """Resize so that the shorter side has `length` pixels; the longer one is rounded down."""

    length: int

    def __call__(self, height: int, width: int) -> Size:
        """The size that a picture of `height` x `width` gets."""
        longer = int(self.length * max(height, width) / min(height, width))
        return (longer, self.length) if width <= height else (self.length, longer)


@dataclass(frozen=True)
class Pipeline:
    """Resize, crop, rescale and normalise a picture, each step where it is set.

    Attributes:
      resize: from (height, width) to the size wanted; None leaves pictures as they are.
      filter: the filter of Pillow.
      crop: height and width of what is cut out of the middle; black is added where the picture is
        smaller.
      square: first set the picture in the middle of a square of the mean colour.
      scale: what values from 0 to 255 are multiplied by; None leaves them.
      mean, std: per channel, of the values after that; None for values that are not normalised.
    """

    resize: Callable[[int, int], Size] | None
    filter: Filter = "bicubic"
    crop: Size | None = None
    square: bool = False
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.filter not in Filter.__args__:
            known = ", ".join(Filter.__args__)
            raise UsageError(f"filter is {self.filter!r}: want one of {known}")
        if (self.mean is None) != (self.std is None):
            raise UsageError(f"mean and std are {self.mean} and {self.std}: want both or neither")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                raise UsageError(f"{name} is {values}: want three numbers")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"std is {self.std}: want three numbers above 0")

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The pixels of `picture` [H, W, 3] uint8, as [h, w, 3] float32.

        Raises:
          ZooError: a side would become longer than `LONGEST`, or the square than
            `LARGEST_SQUARE`.
        """
        if self.square:
            if max(picture.shape) > LARGEST_SQUARE:
                raise ZooError(
                    f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels would be set in "
                    f"a square, which may have a side of {LARGEST_SQUARE}: make it smaller first"
                )
            picture = pad_to_square(picture, self.background)
        if self.resize is not None:
            picture = resized(picture, self.resize(*picture.shape[:2]), self.filter)
        if self.crop is not None:
            picture = center_crop(picture, self.crop)
        return self.normalised(picture)

    @property
    def background(self) -> tuple[int, ...]:
        """The mean colour, from 0 to 255; black where there is none."""
        return (0, 0, 0) if self.mean is None else tuple(int(255 * m) for m in self.mean)

    def normalised(self, picture: np.ndarray) -> np.ndarray:
        """`picture` [..., 3] uint8 rescaled and normalised, as float32 of the same shape."""
        pixels = np.empty(picture.shape, np.float32)
        for channel, values in enumerate(self._values):
            pixels[..., channel] = values[picture[..., channel]]
        return pixels

    @cached_property
    def _values(self) -> np.ndarray:
        """What each of the 256 values of each channel becomes, [3, 256]."""
        # Rounded where the originals round: after scaling in float64, then at every step.
        values = np.arange(256, dtype=np.float64) * (1.0 if self.scale is None else self.scale)
        table = np.tile(values.astype(np.float32), (3, 1))
        if self.mean is not None:
            mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
            table = (table - mean[:, None]) / std[:, None]
        return table


def resized(picture: np.ndarray, size: Size, method: Filter) -> np.ndarray:
    """`picture` [H, W, 3] uint8 as [*size, 3] by Pillow's filter, which averages when shrinking.

    Raises:
      ZooError: a side of `size` is longer than `LONGEST`, or nothing would be left of one.
    """
    height, width = size
    if max(size) > LONGEST or min(size) < 1:
        raise ZooError(
            f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels would be resized to "
            f"{width} x {height}: cut it into pieces of moderate proportions"
        )
    if picture.shape[:2] == (height, width):
        return picture
    filtered = Image.fromarray(picture).resize((width, height), Image.Resampling[method.upper()])
    return np.asarray(filtered)


def shown_in_square(size: Size, side: int) -> tuple[int, int, int, int]:
    """Where a picture of this size lies in the square of `side` pixels that it was set into and
    resized to: top, left, bottom, right.
    """
    short = round(min(size) * (side / max(size)))
    before = (side - short) // 2
    if size[0] < size[1]:
        return before, 0, before + short, side
    return 0, before, side, before + short


def center_crop(picture: np.ndarray, size: Size) -> np.ndarray:
    """The middle of `picture` [H, W, 3] as [*size, 3], with black around what is too small.

    Of an odd number of rows, the one more is cut below and added above, as the originals do.
    """
    (height, width), (tall, wide) = picture.shape[:2], size
    top, left = (height - tall) // 2, (width - wide) // 2
    if top >= 0 and left >= 0:
        return picture[top : top + tall, left : left + wide]
    canvas = np.zeros((max(height, tall), max(width, wide), 3), picture.dtype)
    above, before = -((height - canvas.shape[0]) // 2), -((width - canvas.shape[1]) // 2)
    canvas[above : above + height, before : before + width] = picture
    top, left = top + above, left + before
    return canvas[max(0, top) : top + tall, max(0, left) : left + wide]


def pad_to_square(picture: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """`picture` [H, W, 3] in the middle of a square of `colour` as large as its longer side."""
    height, width = picture.shape[:2]
    if height == width:
        return picture
    side = max(height, width)
    canvas = np.full((side, side, 3), colour, picture.dtype)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = picture
    return canvas
