"""WebDataset: tar files in which the files of a sample follow one another, under one name.

    data=WebDataset("mine/*.tar", columns=Columns(answer="txt", ask="Describe the picture."))

A sample has the files `<key>.<ending>`; endings are the columns: `txt` a text, `json` a record
whose entries are columns too, and every picture (`jpg`, `png`, ...) stands in the column `image` as
well.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.models.core.errors import ZooError
from zoo.train.data.folder import PICTURES
from zoo.train.data.index import Arrays, indexed, text, texts
from zoo.train.data.tables import Rows, Table, shards


@dataclass(frozen=True)
class WebDataset(Table):
    """Tar shards, read in any order and never unpacked.

    Where everything stands in a shard is looked up once and kept below `data_dir`; a shard whose
    size or time has changed is looked through anew. Shards must not be compressed.

    Attributes:
      files: a folder or a glob pattern.
    """

    files: str

    def rows(self, data_dir: str | Path) -> Rows:
        """The samples of all shards."""
        files, faults = shards(self.files)
        return _Samples(files, faults, Path(data_dir) / "index")


class _Samples:
    """The samples of tar files as rows."""

    def __init__(self, files: Sequence[str], faults: Sequence[str], folder: Path):
        indexes = [(path, _index(path, folder)) for path in files]
        self.faults = list(faults)
        for path, index in indexes:
            if not len(index["first"]):
                self.faults.append(f"{path} has no samples")
            if index["cut"]:
                self.faults.append(f"{path} is cut off: it has no end")
        self._shards = [(path, index) for path, index in indexes if len(index["first"])]
        if not self._shards:
            raise ZooError(f"no samples in {', '.join(self.faults)}")
        self._ends = np.cumsum([0, *(len(index["first"]) for _, index in self._shards)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        path, shard, number = self._find(index)
        key, _ = _split(text(shard, int(shard["first"][number])).decode("utf-8", "replace"))
        return f"{path}: {key}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        path, shard, number = self._find(index)
        first = shard["first"]
        last = first[number + 1] if number + 1 < len(first) else len(shard["offset"])
        row: dict[str, Any] = {}
        pictures = []
        try:
            with open(path, "rb") as file:
                for member in range(int(first[number]), int(last)):
                    _, ending = _split(text(shard, member).decode("utf-8", "replace"))
                    file.seek(int(shard["offset"][member]))
                    content = file.read(size := int(shard["size"][member]))
                    if len(content) < size:
                        raise ZooError(f"{self.name(index)}.{ending} is cut off")
                    row[ending] = content
                    if "." + ending.rsplit(".")[-1].lower() in PICTURES:
                        pictures.append(content)
        except OSError as error:
            raise ZooError(f"{path} cannot be read: {error.strerror}") from None
        if "json" in row:
            try:
                entry = json.loads(row["json"])
            except ValueError as error:
                raise ZooError(f"{self.name(index)}.json is not valid JSON: {error}") from None
            row = {**(entry if isinstance(entry, dict) else {}), **row}
        return row | ({"image": pictures} if pictures else {})

    def _find(self, index: int) -> tuple[str, Arrays, int]:
        shard = int(np.searchsorted(self._ends, index, "right")) - 1
        return *self._shards[shard], index - int(self._ends[shard])


def _index(path: str, folder: Path) -> Arrays:
    """Where the files of a shard stand: names, `offset`, `size`; `first` file of every sample."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    status = os.stat(path)
    stamp = np.array([status.st_size, status.st_mtime_ns])

    def holds(arrays: Arrays) -> bool:
        return np.array_equal(arrays.get("stamp"), stamp)

    def make() -> Arrays:
        return {**_look(path), "stamp": stamp}

    return indexed(folder / f"tar-{digest}.npz", holds, make)


def _look(path: str) -> Arrays:
    """Look through the headers of a tar file."""
    names: list[bytes] = []
    places: list[tuple[int, int]] = []
    cut = False
    try:
        with tarfile.open(path, "r:", errorlevel=0) as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError:  # also what `next` says to a header that is cut off
                    cut = True
                    break
                if member is None:
                    break
                # Links, devices and folders are no data; nothing is ever written to their names.
                if member.isreg() and _split(member.name)[1]:
                    names.append(member.name.encode("utf-8", "surrogateescape"))
                    places.append((member.offset_data, member.size))
                tar.members = []  # which it would keep for all files
            cut = cut or bool(places and sum(places[-1]) > os.path.getsize(path))
    except tarfile.ReadError as error:
        raise ZooError(
            f"{path} is no plain tar file: {error}; unpack compressed ones, such as .tar.gz"
        ) from None
    keys = [_split(name.decode("utf-8", "replace"))[0] for name in names]
    first = [i for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
    offset, size = zip(*places, strict=True) if places else ((), ())
    return {
        **texts(names),
        "offset": np.array(offset, np.int64),
        "size": np.array(size, np.int64),
        "first": np.array(first, np.int64),
        "cut": np.array(cut),
    }


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a file: what is before and after the first point of its last part."""
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending
