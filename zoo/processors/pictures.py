"""What stands between an image classifier and the world: pictures, and their classes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.images import Source, listed, read_image
from zoo.models.core.errors import ZooError
from zoo.processors.image import ImageProcessor

PICTURES = "pictures.json"
"""The file that `Pictures` is saved in."""


@dataclass(frozen=True)
class Pictures:
    """Between a record and the arrays of one example.

    Attributes:
      image: how pictures become pixels.
    """

    image: ImageProcessor

    def encode(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One training example.

        Args:
          record: `image`, one picture that `read_image` takes, and `class`, a number from 0.

        Returns:
          pixels [H, W, 3] float32, normalised, and classes [] int32.

        Raises:
          ZooError: the picture cannot be read, there is none or several, or there is no class.
        """
        images, number = listed(record.get("image")), record.get("class")
        if len(images) != 1 or not isinstance(number, int) or number < 0:
            raise ZooError(
                f"{len(images)} pictures of class {number!r}: want one, and a number from 0"
            )
        return {
            "pixels": self.image(read_image(images[0])),
            "classes": np.asarray(number, np.int32),
        }

    def encode_images(self, images: Source | list[Source]) -> dict[str, np.ndarray]:
        """A batch of pictures: pixels [B, H, W, 3]."""
        shown = images if isinstance(images, list) else [images]
        return {"pixels": np.stack([self.image(read_image(image)) for image in shown])}

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
            return cls(ImageProcessor(**json.loads(file.read_text("utf-8"))["image"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZooError(f"{file} is not a processor that can be read: {error}") from error
