"""Files and folders that are either whole or not there.

`manifest.json`, written last, names every other file of a folder with its length and SHA-256: a
folder without it is unfinished, and one that differs from it is damaged.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoo.models.core.errors import ZooError

MANIFEST = "manifest.json"

Digests = Mapping[str, list[Any]]
"""{path of a file in a folder: [length, SHA-256]}."""


def write_atomically(file: Path, text: str) -> None:
    """Write `file` such that at any moment it holds either what it held before or all of `text`."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def write_manifest(folder: Path, known: Digests | None = None) -> None:
    """Declare `folder`, as it is now, to be whole; files in `known` are not read again."""
    listed = digests(folder, known)
    write_atomically(folder / MANIFEST, json.dumps({"files": listed}, indent=1) + "\n")


def digests(folder: Path, known: Digests | None = None) -> Digests:
    """Length and SHA-256 of every file in a folder but its manifest; those in `known` as there."""
    found = (file for file in folder.rglob("*") if file.is_file())
    names = sorted(
        file.relative_to(folder).as_posix() for file in found if file != folder / MANIFEST
    )
    known = known or {}
    return {
        name: known[name]
        if name in known
        else [(folder / name).stat().st_size, _digest(folder / name)]
        for name in names
    }


def check(folder: Path) -> str | None:
    """What is wrong with `folder`, which has a manifest, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # digests are computed beside each other
        problems = pool.map(lambda item: _problem(folder, *item), files.items())
        return next(filter(None, problems), None)


def reach_the_disk(folder: Path) -> None:
    """Return when all files of `folder`, however deep, would survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """Make the folder if need be and keep other runs out of it; a killed run keeps nobody out.

    Raises:
      ZooError: the folder cannot be written, or another run is in it.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below, where the lock ends)
    except OSError as error:
        raise ZooError(
            f"cannot write to {folder}: {error.strerror}; choose another output folder"
        ) from error
    with lock:
        try:
            # Worker processes, which may outlive a killed run, do not inherit a lock of this kind.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ZooError(
                f"another run (process {lock.read().strip() or '?'}) is writing to {folder}: wait "
                "for it, stop it, or choose another output folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def _problem(folder: Path, name: str, recorded: list[Any]) -> str | None:
    size, digest = recorded
    file = folder / name
    try:
        found = file.stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if _digest(file) != digest:
            return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _digest(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
