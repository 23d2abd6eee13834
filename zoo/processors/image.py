"""Pictures of any size to the square, normalised pixels that a vision tower takes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from zoo.models.core.errors import UsageError
from zoo.processors.pixels import Filter, pad_to_square, shown_in_square
from zoo.processors.tiling import Size, crop_grid, cut

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
        square = (self.size, self.size)
        if picture.shape[:2] != square:
            picture = np.asarray(self._fitted(Image.fromarray(picture), square))
        # One long row of channels at a time: four times as fast as three channels at a time.
        scale, shift = self._rows
        pixels = np.multiply(picture.reshape(self.size, -1), scale, dtype=np.float32)
        pixels -= shift
        return pixels.reshape(self.size, self.size, 3)

    def closer(
        self, picture: np.ndarray, *, crops: int, square: bool = False
    ) -> tuple[np.ndarray, Size]:
        """What is seen of `picture` [H, W, 3] uint8, as crops [n, size, size, 3] float32.

        Args:
          picture: the picture; where `fit` pads or crops it, the square that comes of this is cut.
          crops: how many at most.
          square: see `zoo.processors.tiling.crop_grid`.

        Returns:
          the crops row by row, and their rows and columns.
        """
        seen: Size = picture.shape[:2]
        if self.fit != "squash":
            seen = ((max if self.fit == "pad" else min)(seen),) * 2
        rows, columns = crop_grid(seen, tile=self.size, crops=crops, square=square)
        large = self._fitted(Image.fromarray(picture), (rows * self.size, columns * self.size))
        parts = cut(np.asarray(large), (rows, columns))
        return np.stack([self(part) for part in parts]), (rows, columns)

    def shown(self, size: Size) -> tuple[int, int, int, int]:
        """Where a picture of this size lies in the pixels: top, left, bottom, right."""
        return shown_in_square(size if self.fit == "pad" else (1, 1), self.size)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and subtrahend of each value in a row of pixels, [3 size] each."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.tile(1 / (255 * std), self.size), np.tile(mean / std, self.size)

    def _fitted(self, picture: Image.Image, size: Size) -> Image.Image:
        """What `fit` leaves of `picture`, resized to `size`."""
        (height, width), side = size, max(size)
        method = Image.Resampling[self.resize.upper()]
        if self.fit == "crop":
            picture = ImageOps.fit(picture, (side, side), method)
        elif self.fit == "pad":
            colour = tuple(int(255 * m) for m in self.mean)
            if max(picture.size) ** 2 > _LARGEST_SQUARE:
                # A long panorama would make a huge square: resize first, which differs at the seams
                # only.
                picture = ImageOps.pad(picture, (side, side), method, colour)
            else:
                picture = Image.fromarray(pad_to_square(np.asarray(picture), colour))
        return picture.resize((width, height), method)
