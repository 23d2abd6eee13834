"""Indexes of data sets that would take long to look through at every start."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def indexed(file: Path, holds: Callable[[Arrays], bool], make: Callable[[], Arrays]) -> Arrays:
    """The index that `file` keeps, made anew if there is none or it no longer holds.

    Args:
      file: where it is kept. If it cannot be written, the index is made at every start.
      holds: whether a kept index still describes what is there; to be quick.
      make: looks through the data.
    """
    kept = _read(file)
    if kept is not None and holds(kept):
        return kept
    made = make()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            np.savez(part, **made)
        os.replace(part.name, file)
    return made


def texts(items: list[bytes]) -> Arrays:
    """Many short texts as two arrays, which take little memory; see `text`."""
    lengths = np.fromiter(map(len, items), np.int64, len(items))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return {"letters": np.frombuffer(b"".join(items), np.uint8), "ends": ends}


def text(arrays: Arrays, index: int) -> bytes:
    """Text `index` of those that `texts` was given."""
    start, end = arrays["ends"][index : index + 2]
    return arrays["letters"][start:end].tobytes()


def _read(file: Path) -> Arrays | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
