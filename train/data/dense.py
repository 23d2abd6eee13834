"""Data sets whose answers are as large as their pictures, made of the packaged scans of digits.

Records have `image`, one picture or the slices of a volume, and either `classes`, one for every
place (`zoo.train.objectives.dense.Segment`), or `target`, another picture
(`zoo.train.objectives.restore.Restore`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.models.core.errors import UsageError
from zoo.train.data.digits_vqa import SPLITS, Scans, Scene, draw, scans
from zoo.train.data.sources import DataConfig, Source, check_split


@dataclass(frozen=True)
class DigitsSegment(DataConfig):
    """Pictures or volumes composed of handwritten digits (see `zoo.train.data.digits_vqa`), with 11
    classes of places: 0 is paper, 1 to 10 the ink of the digits 0 to 9.

    They are drawn when they are read; no scan is in both splits.

    Attributes:
      pictures, validation_pictures: how many.
      seed: other seeds give other pictures.
      slices: of a volume, see `zoo.train.data.digits_vqa.draw`; None for pictures.
      scene: how pictures look.
    """

    pictures: int = 1440
    validation_pictures: int = 360
    seed: int = 0
    slices: int | None = None
    scene: Scene = field(default_factory=lambda: Scene(min_scans=1, min_size=22, max_size=30))

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.validation_pictures < 1:
            raise UsageError(
                f"pictures and validation_pictures are {self.pictures} and "
                f"{self.validation_pictures}: want at least 1 of each"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: want 0 or more")
        if self.slices is not None and self.slices < 1:
            raise UsageError(f"slices is {self.slices}: want 1 or more, or None for pictures")

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The pictures of `split`; nothing has to be prepared."""
        del data_dir
        check_split(split)
        return _Composed(self, split)


class _Composed:
    def __init__(self, config: DigitsSegment, split: str):
        self._config, self._split, self._scans = config, split, scans(split)

    def __len__(self) -> int:
        c = self._config
        return c.pictures if self._split == "train" else c.validation_pictures

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        c, index = self._config, range(len(self))[index]
        # A stream of its own for each, which does not depend on how many there are.
        rng = np.random.default_rng((c.seed, SPLITS.index(self._split), index))
        drawn = draw(c.scene, self._scans, rng, c.slices or 1)
        name = f"{self._split}-{index:06d}"
        if c.slices is None:
            return {"id": name, "image": drawn.picture[0], "classes": drawn.classes[0]}
        return {"id": name, "image": tuple(drawn.picture), "classes": drawn.classes}


@dataclass(frozen=True)
class DigitsRestore(DataConfig):
    """The scans themselves at a lower resolution, each pixel the mean of factor x factor; the
    targets are the scans of 8 x 8 pixels, 1,437 for training and 360 others for validation.

    Attributes:
      factor: 2 or 4.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        if self.factor not in (2, 4):
            raise UsageError(f"factor is {self.factor}: want 2 or 4, for scans of 8 x 8 pixels")

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The scans of `split`; nothing has to be prepared."""
        del data_dir
        check_split(split)
        return _Reduced(split, scans(split), self.factor)


class _Reduced:
    def __init__(self, split: str, found: Scans, factor: int):
        self._split, self._found, self._factor = split, found, factor

    def __len__(self) -> int:
        return len(self._found.labels)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        index = range(len(self))[index]
        ink, side = self._found.ink[index], 8 // self._factor
        small = ink.reshape(side, self._factor, side, self._factor).mean((1, 3))
        small, large = (np.round(x * 255).astype(np.uint8) for x in (small, ink))
        return {"id": f"{self._split}-{index:04d}", "image": small, "target": large}
