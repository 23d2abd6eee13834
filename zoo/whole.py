"""Files and folders that are either whole or not there.

`manifest.json`, written last, names every other file of a folder with its length and SHA-256: a
folder without it is unfinished, and one that differs from it is damaged.
"""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"


def write_atomically(file: Path, text: str) -> None:
    """Write `file` such that at any moment it holds either what it held before or all of `text`."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def write_manifest(folder: Path) -> None:
    """Declare `folder`, as it is now, to be whole."""
    found = (file for file in folder.rglob("*") if file.is_file())
    files = sorted(file for file in found if file != folder / MANIFEST)
    listed = {
        file.relative_to(folder).as_posix(): [file.stat().st_size, _digest(file)] for file in files
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": listed}, indent=1) + "\n")


def check(folder: Path) -> str | None:
    """What is wrong with `folder`, which has a manifest, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, (size, digest) in files.items():
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
