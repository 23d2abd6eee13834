"""What stands between a vision model and the world: pictures or volumes, and their answers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.images import Source, listed, read_image
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.colour import rgb_to_ycbcr
from zoo.processors.image import ImageProcessor

PICTURES = "pictures.json"
"""The file that `Pictures` is saved in."""


@dataclass(frozen=True)
class Pictures:
    """Between a record and the arrays of one example.

    Attributes:
      image: how pictures become pixels.
      channels: C, of the pixels: 3, or 1 for luma alone.
      slices: Z, the pictures that make a volume; None where there are no volumes.
    """

    image: ImageProcessor
    channels: int = 3
    slices: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UsageError(f"channels is {self.channels}: want 3, or 1 for luma")

    def encode(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One training example.

        Args:
          record: `image`, one picture that `read_image` takes or all slices of a volume, and one of
            `class`, a number from 0; `classes`, integers for every place of pictures that have the
            size of the pixels; and `target`, another picture.

        Returns:
          pixels [H, W, C] float32, normalised, of volumes [Z, H, W, C]; and classes int32, [] or
          [H, W] or [Z, H, W], or target [H', W', C] float32 in [0, 1].

        Raises:
          ZooError: a picture cannot be read, there are too few or too many, or the answer does not
            fit.
        """
        images = listed(record.get("image"))
        self._check(len(images))
        pictures = [read_image(image) for image in images]
        found = {"pixels": self._pixels(pictures)}
        if "target" in record:
            target = self._shown(read_image(record["target"]).astype(np.float32))
            return found | {"target": target / np.float32(255)}
        if "classes" in record:
            classes, want = np.asarray(record["classes"]), found["pixels"].shape[:-1]
            sizes = {picture.shape[:2] for picture in pictures}
            if classes.shape != want or sizes != {want[-2:]} or classes.dtype.kind not in "iu":
                raise ZooError(
                    f"classes {classes.dtype} {classes.shape} of pictures of "
                    f"{' and '.join(map(str, sorted(sizes)))}: want integers {want} for pictures "
                    f"of {want[-2:]}"
                )
            return found | {"classes": classes.astype(np.int32)}
        number = record.get("class")
        if not isinstance(number, int) or number < 0:
            raise ZooError(f"a picture of class {number!r}: want a number from 0")
        return found | {"classes": np.asarray(number, np.int32)}

    def encode_images(
        self, images: Source | list[Source] | list[list[Source]]
    ) -> dict[str, np.ndarray]:
        """A batch of pictures, pixels [B, H, W, C], or of volumes, [B, Z, H, W, C], each a list of
        its slices. Raises ZooError if a volume has too few or too many.
        """
        made = []
        for image in images if isinstance(images, list) else [images]:
            slices = image if isinstance(image, list) else [image]
            self._check(len(slices))
            made.append(self._pixels([read_image(each) for each in slices]))
        return {"pixels": np.stack(made)}

    def _check(self, number: int) -> None:
        """Whether so many pictures make an example."""
        if number != (1 if self.slices is None else self.slices):
            raise ZooError(f"{number} pictures: want {self.slices or 1}")

    def _pixels(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Of one example."""
        made = [self._shown(self.image(picture)) for picture in pictures]
        return made[0] if self.slices is None else np.stack(made)

    def _shown(self, rgb: np.ndarray) -> np.ndarray:
        """The channels [H, W, C] that the model takes."""
        return rgb if self.channels == 3 else rgb_to_ycbcr(rgb)[..., :1].astype(np.float32)

    def save(self, folder: str | Path) -> None:
        """Write `pictures.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PICTURES).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Pictures":
        """Read what `save` wrote. Raises ZooError if the file is missing or damaged."""
        file = Path(folder) / PICTURES
        try:
            stored = json.loads(file.read_text("utf-8"))
            return cls(ImageProcessor(**stored.pop("image")), **stored)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ZooError(f"{file} is not a processor that can be read: {error}") from error
