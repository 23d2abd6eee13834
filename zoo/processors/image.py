"""Pictures of any size to the square, normalised pixels that a vision tower takes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from zoo.models.core.errors import UsageError
from zoo.processors.pixels import Filter, pad_to_square

Fit = Literal["pad", "squash", "crop"]

_LARGEST_SQUARE = 1 << 26


@dataclass(frozen=True)
class ImageProcessor:
    """Resize a picture to `size` x `size` and normalise its channels.

    Attributes:
      size: side of the result in pixels.
      mean, std: per channel, of values between 0 and 1; a pixel v becomes `(v / 255 - mean) / std`.
      resize: the filter of Pillow, which averages over all source pixels when it makes a picture
        smaller.
      fit: what becomes of a picture that is not square. `pad` sets it in the middle of a square of
        the mean colour first, as LLaVA does; `squash` changes its proportions; `crop` resizes the
        shorter side and keeps the middle, as CLIP does.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Filter = "bicubic"
    fit: Fit = "pad"

    def __post_init__(self) -> None:
        # A configuration read from JSON brings lists, which would make this unhashable.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.size < 1:
            raise UsageError(f"image size is {self.size}: want at least 1 pixel")
        if self.resize not in Filter.__args__:
            raise UsageError(f"resize is {self.resize!r}: want one of {', '.join(Filter.__args__)}")
        if self.fit not in Fit.__args__:
            raise UsageError(f"fit is {self.fit!r}: want one of {', '.join(Fit.__args__)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(
                f"mean and std are {self.mean} and {self.std}: want three numbers each, std above 0"
            )

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The pixels of `picture` [H, W, 3] uint8, as [size, size, 3] float32."""
        if picture.shape[:2] != (self.size, self.size):
            picture = np.asarray(self._fitted(Image.fromarray(picture)))
        # One long row of channels at a time: four times as fast as three channels at a time.
        scale, shift = self._rows
        pixels = np.multiply(picture.reshape(self.size, -1), scale, dtype=np.float32)
        pixels -= shift
        return pixels.reshape(self.size, self.size, 3)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and subtrahend of each value in a row of pixels, [3 size] each."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.tile(1 / (255 * std), self.size), np.tile(mean / std, self.size)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        square = (self.size, self.size)
        method = Image.Resampling[self.resize.upper()]
        if self.fit == "crop":
            return ImageOps.fit(picture, square, method)
        if self.fit == "pad":
            colour = tuple(int(255 * m) for m in self.mean)
            if max(picture.size) ** 2 > _LARGEST_SQUARE:
                # A long panorama would make a huge square: resize first, which differs at the seams
                # only.
                return ImageOps.pad(picture, square, method, colour)
            picture = Image.fromarray(pad_to_square(np.asarray(picture), colour))
        return picture.resize(square, method)
