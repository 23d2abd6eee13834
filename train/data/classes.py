"""Data sets of pictures with one class each, for `zoo.train.objectives.classify.Classify`.

Their records have `image` and `class`, a number from 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.models.core.errors import UsageError, ZooError
from zoo.train.data.digits_vqa import Scans, scans
from zoo.train.data.sources import DataConfig, NoRecordsError, Source, check_split


@dataclass(frozen=True)
class DigitsClassify(DataConfig):
    """The packaged scans of handwritten digits (see `zoo.train.data.digits_vqa`): 8 x 8 pixels, ten
    classes, 1,437 for training and 360 others for validation.

    Attributes:
      ink: brightness of full ink on black paper, from 1 to 255.
    """

    ink: int = 255

    def __post_init__(self) -> None:
        if not 1 <= self.ink <= 255:
            raise UsageError(f"ink is {self.ink}: want 1 to 255")

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The scans of `split`; nothing has to be prepared."""
        del data_dir
        check_split(split)
        return _Scans(split, scans(split), self.ink)


class _Scans:
    def __init__(self, split: str, found: Scans, ink: int):
        self._split, self._found, self._ink = split, found, ink

    def __len__(self) -> int:
        return len(self._found.labels)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        index = range(len(self))[index]
        picture = np.round(self._found.ink[index] * self._ink).astype(np.uint8)
        number = int(self._found.labels[index])
        return {"id": f"{self._split}-{index:04d}", "image": picture, "class": number}


@dataclass(frozen=True)
class ClassFolders(DataConfig):
    """Pictures in one folder per class: `train/cat/7.jpg`, `validation/dog/3.png`.

    Classes are numbered by the names of the folders of `train`, in alphabetical order.

    Attributes:
      folder: the folder with `train` and, for evaluation, `validation`.
    """

    folder: str

    def prepare(self, data_dir: str | Path, progress: Any = None) -> None:
        """Copy nothing; raise ZooError at once if there are no classes."""
        self.names()

    def names(self) -> tuple[str, ...]:
        """The names of the classes. Raises ZooError if there are none."""
        train = Path(self.folder) / "train"
        found = sorted(path.name for path in train.glob("*") if path.is_dir())
        if not found:
            raise ZooError(f"{train} has no folders: want one for each class, with its pictures")
        return tuple(found)

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The pictures of `split`, class by class.

        Raises:
          ZooError: there are none, or a folder of a class that `train` does not have.
        """
        del data_dir
        check_split(split)
        names, root = self.names(), Path(self.folder) / split
        if not root.is_dir():
            raise NoRecordsError(f"{root} is no folder: there is nothing for {split}")
        if unknown := sorted(p.name for p in root.glob("*") if p.is_dir() and p.name not in names):
            raise ZooError(f"{root / unknown[0]}: `train` has no such class")
        files = [
            (path, number)
            for number, name in enumerate(names)
            for path in sorted((root / name).glob("*"))
            if path.is_file()
        ]
        if not files:
            raise NoRecordsError(f"{root} has no pictures in the folders of its classes")
        return _Files(files)


class _Files:
    def __init__(self, files: list[tuple[Path, int]]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        path, number = self._files[index]
        return {"id": str(path), "image": path, "class": number}
