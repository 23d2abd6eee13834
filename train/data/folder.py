"""A folder of pictures with a text beside each.

    data=Folder("mine", ask="Describe the picture.")

`a.jpg` goes with `a.txt`, the answer to `ask`, or with `a.json`, a record in LLaVA's form.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.models.core.errors import UsageError, ZooError
from zoo.train.data.index import Arrays, indexed, text, texts
from zoo.train.data.tables import Rows, Table

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})

_NOTHING, _TEXT, _RECORD = "-", "t", "j"


@dataclass(frozen=True)
class Folder(Table):
    """Pictures with texts, in a folder and all folders in it.

    The folder is looked through once. At later starts only the folders in it are asked whether
    something was added or removed, which is quick for a million files. Symbolic links to folders
    are not followed.

    Attributes:
      path: the folder.
      ask: the question that the texts answer.
    """

    path: str
    ask: str = "Describe the picture."

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ask.strip():
            raise UsageError("ask is empty: say what is asked about every picture")

    def rows(self, data_dir: str | Path) -> Rows:
        """One row for each picture, in the order of their names."""
        root = os.path.abspath(self.path)
        if not os.path.isdir(root):
            raise ZooError(f"{self.path} is not a folder: `path` names the one with pictures")
        digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
        kept = Path(data_dir) / "index" / f"folder-{digest}.npz"
        index = indexed(kept, lambda arrays: _unchanged(root, arrays), lambda: _look(root))
        if len(index["ends"]) < 2:
            raise ZooError(f"{self.path} has no pictures: known are {', '.join(sorted(PICTURES))}")
        return _Pictures(root, index, self.ask)


class _Pictures:
    """The pictures of a folder and the texts beside them."""

    def __init__(self, root: str, index: Arrays, ask: str):
        self.faults: list[str] = []
        self._root = root
        self._index = index
        self._ask = ask

    def __len__(self) -> int:
        return len(self._index["ends"]) - 1

    def name(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(text(self._index, index)))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        name = self.name(index)
        stem = os.path.splitext(name)[0]
        beside = chr(self._index["beside"][index])
        if beside == _NOTHING:
            raise ZooError(f"{name} has neither {stem}.txt nor {stem}.json beside it")
        picture = _read(name)
        if beside == _TEXT:
            said = _read(f"{stem}.txt").decode("utf-8", "replace")
            asked = {"from": "human", "value": self._ask}
            return {
                "image": picture,
                "conversations": [asked, {"from": "gpt", "value": said}],
            }
        try:
            entry = json.loads(_read(f"{stem}.json"))
        except ValueError as error:
            raise ZooError(f"{stem}.json is not valid JSON: {error}") from None
        if not isinstance(entry, dict):
            raise ZooError(f"{stem}.json is a {type(entry).__name__}, want a record")
        return {**entry, "image": picture}


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ZooError(f"{path} cannot be read: {error.strerror}") from None


def _look(root: str) -> Arrays:
    """Look through a folder: its pictures, what is beside them, and when its folders changed."""
    names: list[bytes] = []
    beside: list[str] = []
    folders: list[bytes] = []
    changed: list[int] = []
    for folder, when, files in _folders(root):
        folders.append(os.fsencode(folder))
        changed.append(when)
        here = set(files)
        for file in files:
            stem, ending = os.path.splitext(file)
            if ending.lower() in PICTURES:
                names.append(os.fsencode(os.path.join(folder, file)))
                text_beside = _TEXT if f"{stem}.txt" in here else _NOTHING
                beside.append(_RECORD if f"{stem}.json" in here else text_beside)
    inside = texts(folders)
    return {
        **texts(names),
        "beside": np.frombuffer("".join(beside).encode(), np.uint8),
        "changed": np.array(changed, np.int64),
        "folder_letters": inside["letters"],
        "folder_ends": inside["ends"],
    }


def _folders(root: str) -> Iterator[tuple[str, int, list[str]]]:
    """(path below `root`, when it changed, its files in order) of all folders, in order."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        when = os.stat(path).st_mtime_ns  # before looking: what comes meanwhile is seen next time
        with os.scandir(path) as found:
            entries = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in found)
        yield folder, when, [name for name, is_folder in entries if not is_folder]
        waiting += [os.path.join(folder, name) for name, is_folder in entries[::-1] if is_folder]


def _unchanged(root: str, index: Arrays) -> bool:
    """Whether nothing was added to or removed from any of the folders."""
    try:
        inside = {"letters": index["folder_letters"], "ends": index["folder_ends"]}
        for i, when in enumerate(index["changed"]):
            path = os.path.join(root, os.fsdecode(text(inside, i)))
            if os.stat(path).st_mtime_ns != when:
                return False
    except (OSError, KeyError):
        return False
    return "beside" in index
