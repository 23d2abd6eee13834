"""Parameters on disk in parts: Orbax checkpoints of a few arrays each, made and read alone.

Rows of stacked parameters are arrays of their own, so that nobody ever needs a whole one in memory:
row 3 of "decoder/stack/layers/q/kernel" is called "decoder/stack/layers/q/kernel/3".
"""

import contextlib
import ctypes
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from zoo.convert.place import flat_paths, nested
from zoo.convert.tensor import DTYPES, NAMES
from zoo.models.core.errors import ZooError
from zoo.models.core.keytable import Piece

PART_BYTES = 1 << 26
"""A part is closed when it holds as many; a single array may be larger."""

Listing = Mapping[str, Any]
"""What there is, ready for JSON: "leaves" {path: {"shape", "dtype"}} and "parts" {name: its arrays
as [path, row or None]}."""


def plan_parts(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into parts; which is the same every time."""
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += piece.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def write_part(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write a part, in place of what is there.

    Raises:
      ZooError: it could not be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        _name(path, piece.row): np.asarray(array, piece.leaves[path][1], order="C")
        for piece in pieces
        for path, array in piece.read().items()
    }
    try:
        with _orbax() as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(nested(arrays)))
    except Exception as error:  # Orbax and TensorStore raise many sorts for a failed write
        raise ZooError(f"{folder} could not be written: {_why(error)}") from error


def list_parts(parts: Mapping[str, Sequence[Piece]]) -> Listing:
    """The listing of parts that have been written."""
    leaves = {
        path: {"shape": list(shape), "dtype": NAMES[dtype]}
        for pieces in parts.values()
        for piece in pieces
        for path, (shape, dtype) in piece.leaves.items()
    }
    arrays = {
        name: [[path, piece.row] for piece in pieces for path in piece.leaves]
        for name, pieces in parts.items()
    }
    return {"leaves": leaves, "parts": arrays}


class StoredParts:
    """The parameters in a folder, read when an array is asked for, a part at a time.

    Args:
      folder: of the model.
      listing: what there is.
    """

    def __init__(self, folder: Path, listing: Listing):
        self._folder = folder
        self._parts = listing["parts"]
        self._homes = {
            _name(*array): name for name, arrays in self._parts.items() for array in arrays
        }
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})
        self.leaves = {
            path: (tuple(leaf["shape"]), DTYPES[leaf["dtype"]])
            for path, leaf in listing["leaves"].items()
        }

    def tree(self) -> dict[str, Any]:
        """The parameters as things that `Table.unstream` takes."""
        return nested(
            {path: _Stored(self, path, shape) for path, (shape, _) in self.leaves.items()}
        )

    def pieces(self) -> Iterator[Piece]:
        """All parameters, in the order in which they are stored."""
        for arrays in self._parts.values():
            for path, row in arrays:
                read = partial(self._only, path, row)
                yield Piece({path: self.leaves[path]}, row, (), read)

    def read(self, path: str, row: int | None) -> np.ndarray:
        """One array; the part that it is in is kept until an array of another one is read."""
        name = self._homes[_name(path, row)]
        if self._last[0] != name:
            self._last = ("", {})  # before the next is read, not beside it
            _return_freed_memory()
            self._last = (name, self._part(name))
        return self._last[1][_name(path, row)]

    def _only(self, path: str, row: int | None) -> dict[str, np.ndarray]:
        return {path: self.read(path, row)}

    def _part(self, name: str) -> dict[str, np.ndarray]:
        names = [_name(*array) for array in self._parts[name]]
        item = nested(dict.fromkeys(names, 0))
        args = nested(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)))
        folder = (self._folder / name).absolute()
        try:
            with _orbax() as checkpointer:
                restore = ocp.args.PyTreeRestore(item, restore_args=args)
                return flat_paths(checkpointer.restore(folder, args=restore))
        except Exception as error:
            raise ZooError(f"{folder} cannot be read: {_why(error)}") from error


@dataclass(frozen=True)
class _Stored:
    parts: StoredParts
    path: str
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.parts.read(self.path, None), dtype)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.parts.read(self.path, row)


def _return_freed_memory() -> None:
    """Let glibc give back what it keeps of the arrays that TensorStore's threads have freed: it
    would add up to a third of the checkpoint.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _name(path: str, row: int | None) -> str:
    return path if row is None else f"{path}/{row}"


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """A checkpointer that keeps its warnings to itself: weights hardly compress, so they are not;
    its errors arrive as exceptions.
    """
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            yield checkpointer
    finally:
        absl_logging.set_verbosity(verbosity)


def _why(error: BaseException) -> str:
    """The cause in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
