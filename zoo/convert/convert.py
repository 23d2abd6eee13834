"""A Hugging Face checkpoint written as a folder of this zoo.

    config.json      layout version, configuration, where it is from
    params/000, ...  the parameters, each part an Orbax checkpoint of some of them; rows of stacked
                     ones by themselves
    tensors.json     which parameters are in which part; every tensor of the original with its
                     dtype, shape and SHA-256
    source/          the original's configuration, tokenizer, preprocessing and card, as they were
    manifest.json    length and digest of all files

`zoo.load` reads it, `zoo export` turns it back. Until it is whole it is called
".<name>.converting", where a rerun after a kill finds the parts that are finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.convert.checkpoint import Checkpoint, open_checkpoint
from zoo.convert.folder import CONFIG as THEIR_CONFIG
from zoo.convert.folder import WEIGHTS
from zoo.convert.hub import CARRIED, folder_of
from zoo.convert.parts import list_parts, plan_parts, write_part
from zoo.convert.tensor import NAMES, Tensor
from zoo.models.core.codec import encode
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.keytable import Piece
from zoo.saving import CONFIG, LAYOUT, PARTS, SOURCE, TENSORS
from zoo.whole import (
    MANIFEST,
    check,
    digests,
    locked,
    reach_the_disk,
    write_atomically,
    write_manifest,
)

_JOURNAL, _ORIGIN = "journal.jsonl", "origin.json"


@dataclass(frozen=True)
class Converted:
    """What a conversion has done.

    Attributes:
      folder: the result.
      model_type: the architecture.
      tensors: how many tensors the original has.
      bytes: of these tensors.
      parts: how many parts there are.
      resumed: how many of them an earlier, interrupted call had finished.
      dropped: tensors of the original that follow from its configuration, or say nothing about the
        model, and were left out.
    """

    folder: str
    model_type: str
    tensors: int
    bytes: int
    parts: int
    resumed: int
    dropped: tuple[str, ...]


def convert(
    source: str | Path, destination: str | Path, say: Callable[[str], None] = lambda line: None
) -> Converted:
    """Convert a checkpoint; a rerun of an interrupted call goes on where it was.

    Args:
      source: a Hugging Face folder or hub name.
      destination: a folder that is not there yet, or empty.
      say: is told how far it is.

    Raises:
      UsageError: the destination holds something else; or as `open_checkpoint`.
      ZooError: the checkpoint cannot be used, in which case nothing is written, or the destination
        cannot be written.
    """
    checkpoint = open_checkpoint(folder_of(source))
    pieces = checkpoint.pieces()
    for tensor in checkpoint.layout.tensors.values():
        tensor.span.check()
    origin = _origin(checkpoint)
    destination = Path(destination).absolute()
    _check_destination(destination, checkpoint.folder)
    if (destination / MANIFEST).is_file():
        return _finished(destination, origin)
    work = destination.with_name(f".{destination.name}.converting")
    try:
        with locked(work):
            parts = _Parts(work, origin)
            _check_room(checkpoint, work)
            for number, part in enumerate(plan_parts(pieces)):
                parts.add(number, part, checkpoint)
                say(f"{parts.bytes:,} of {_nbytes(checkpoint):,} bytes")
            facts = _facts(checkpoint, parts, destination)
            _finish(work, checkpoint, parts, facts, source)
            if destination.exists():
                destination.rmdir()  # it is empty
            work.rename(destination)
    except OSError as error:
        raise ZooError(
            f"the model could not be written to {destination}: {error.strerror or error}; make "
            "room or choose another folder, and run the same command again"
        ) from error
    return facts


class _Parts:
    """The parts in a folder, and a journal of those that are finished."""

    def __init__(self, work: Path, origin: Mapping[str, Any]):
        self._work = work
        self._file = work / _JOURNAL
        if _read_json(work / _ORIGIN) != origin:  # of another source, or none yet
            for path in work.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_atomically(work / _ORIGIN, json.dumps(origin))
        self._known = self._read()
        self.done: list[dict[str, Any]] = []
        self.pieces: dict[str, list[Piece]] = {}
        self.resumed = 0

    def add(self, number: int, pieces: list[Piece], checkpoint: Checkpoint) -> None:
        """Write a part, unless it is there already and as it was written."""
        name = f"{PARTS}/{number:03}"
        line = self._known.get(name)
        if line and digests(self._work / name) == line["files"]:
            self.resumed += 1
        else:
            write_part(self._work / name, pieces)
            keys = [key for piece in pieces for key in piece.keys]
            line = {
                "name": name,
                "files": dict(digests(self._work / name)),
                "sha256": {key: sha256(np.asarray(checkpoint.layout.tensors[key])) for key in keys},
            }
            reach_the_disk(self._work / name)
            with open(self._file, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.pieces[name] = pieces
        self.done.append(line)

    @property
    def bytes(self) -> int:
        """Of the parameters in all finished parts."""
        return sum(piece.nbytes for pieces in self.pieces.values() for piece in pieces)

    def _read(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        lines = self._file.read_text("utf-8").splitlines()
        found = [line for line in map(_parse, lines) if line is not None]
        return {line["name"]: line for line in found}


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the journal; None for one that a kill has cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _finish(
    work: Path, checkpoint: Checkpoint, parts: _Parts, facts: Converted, source: str | Path
) -> None:
    """Write everything but the parts; the folder is then whole."""
    copy_source(checkpoint.folder, work / SOURCE)
    written = {name: digest for line in parts.done for name, digest in line["sha256"].items()}
    tensors = {
        name: _describe(key, checkpoint.layout.tensors[key], written.get(key))
        for name, key in checkpoint.layout.names.items()
        if key is not None
    }
    listing = {**list_parts(parts.pieces), "tensors": tensors}
    write_atomically(work / TENSORS, json.dumps(listing, indent=1) + "\n")
    about = {"source": str(source), "base": checkpoint.base.slug, "origin": _origin(checkpoint)}
    described = {
        "layout": LAYOUT,
        "model": encode(checkpoint.config),
        "cards": [],
        "about": {**about, "model_type": facts.model_type, "dropped": list(facts.dropped)},
    }
    write_atomically(work / CONFIG, json.dumps(described, indent=2) + "\n")
    for name in (_JOURNAL, _ORIGIN, ".lock"):
        (work / name).unlink()
    known = {
        f"{line['name']}/{file}": digest
        for line in parts.done
        for file, digest in line["files"].items()
    }
    write_manifest(work, known)
    reach_the_disk(work)


def _describe(key: str, tensor: Tensor, digest: str | None) -> dict[str, Any]:
    """A tensor of the original; `digest` is None if it became no parameter."""
    digest = digest or sha256(np.asarray(tensor))
    dtype, shape = NAMES[tensor.dtype], list(tensor.shape)
    return {"key": key, "dtype": dtype, "shape": shape, "sha256": digest}


def copy_source(folder: Path, to: Path) -> None:
    """Copy all that belongs to a checkpoint beside its weights."""
    to.mkdir(exist_ok=True)
    carried = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    weights = {path for pattern in WEIGHTS for path in folder.glob(pattern)}
    for path in sorted(carried - weights):
        shutil.copyfile(path, to / path.name)


def _facts(checkpoint: Checkpoint, parts: _Parts, destination: Path) -> Converted:
    return Converted(
        folder=str(destination),
        model_type=checkpoint.model_type,
        tensors=len(checkpoint.layout.names),
        bytes=_nbytes(checkpoint),
        parts=len(parts.done),
        resumed=parts.resumed,
        dropped=tuple(name for name, key in checkpoint.layout.names.items() if key is None),
    )


def _finished(destination: Path, origin: Mapping[str, Any]) -> Converted:
    """What an earlier call with the same source has made of it."""
    described = _read_json(destination / CONFIG) or {}
    about = described.get("about", {})
    if about.get("origin") != origin:
        raise UsageError(
            f"{destination} holds another model: choose another folder, or delete it first"
        )
    if problem := check(destination):
        raise ZooError(f"{destination} is damaged: {problem}; delete it and convert again")
    listing = _read_json(destination / TENSORS) or {}
    return Converted(
        folder=str(destination),
        model_type=about["model_type"],
        tensors=len(listing["tensors"]) + len(about["dropped"]),
        bytes=origin["bytes"],
        parts=len(listing["parts"]),
        resumed=len(listing["parts"]),
        dropped=tuple(about["dropped"]),
    )


def _check_destination(destination: Path, source: Path) -> None:
    if destination == source.absolute():
        raise UsageError(f"{destination} is the source too: choose another folder")
    if not destination.exists() or (destination / MANIFEST).is_file():
        return
    if not destination.is_dir() or any(destination.iterdir()):
        raise UsageError(
            f"{destination} exists and holds other things: choose a folder that is new or empty"
        )


def _check_room(checkpoint: Checkpoint, work: Path) -> None:
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    need, free = _nbytes(checkpoint) - there, shutil.disk_usage(work).free
    if need > free:
        raise ZooError(
            f"{work.parent} has {free:,} bytes left and the model needs {need:,} more: make room "
            "or choose another folder, and run the same command again"
        )


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.layout.tensors.values())


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells one checkpoint from another without reading its weights."""
    spans = {tensor.span.file for tensor in checkpoint.layout.tensors.values()}
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(spans)}
    config = (checkpoint.folder / THEIR_CONFIG).read_bytes()
    return {
        "files": files,
        "config": hashlib.sha256(config).hexdigest(),
        "bytes": _nbytes(checkpoint),
        "model": encode(checkpoint.config),
    }


def sha256(array: np.ndarray) -> str:
    """Of the bytes of an array, row by row."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
