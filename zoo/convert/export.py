"""A converted model back in the Hugging Face layout, every tensor as it was."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np

from zoo.convert.convert import sha256
from zoo.convert.parts import StoredParts
from zoo.convert.safetensors import write_header
from zoo.convert.tensor import DTYPES
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.keytable import Table
from zoo.models.core.registry import base
from zoo.saving import SOURCE, TENSORS, read_description
from zoo.whole import reach_the_disk

SHARD_BYTES = 5_000_000_000
"""A file of weights is closed before it would be larger; a single tensor may be."""

Entries = Mapping[str, Mapping[str, Any]]
"""{name of a tensor: its "key" in the key table, "dtype", "shape" and "sha256"}."""


@dataclass(frozen=True)
class Exported:
    """What an export has written: the folder, how many tensors and bytes, and the weight files."""

    folder: str
    tensors: int
    bytes: int
    files: tuple[str, ...]


def export(source: str | Path, destination: str | Path) -> Exported:
    """Write a converted model as the Hugging Face checkpoint that it was made of.

    Names, shapes, dtypes and bits of all tensors are those of the original, but for those that say
    nothing about the model, which are left out (`zoo.convert.layout.BUFFERS`).

    Args:
      source: a folder that `zoo.convert.convert` has made.
      destination: a folder that is not there yet, or empty.

    Raises:
      UsageError: the source was not converted, or the destination holds other things.
      ZooError: the source is damaged, or the destination cannot be written; then nothing is there.
    """
    source, destination = Path(source), Path(destination).absolute()
    if not source.exists():
        raise UsageError(f"{source} does not exist: name a folder that `zoo convert` has made")
    if not (source / SOURCE).is_dir():
        raise UsageError(
            f"{source} holds no converted checkpoint, and only these have a Hugging Face layout to "
            "go back to: name a folder that `zoo convert` has made"
        )
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} exists: choose a folder that is new or empty")
    description = read_description(source)
    listing = json.loads((source / TENSORS).read_text("utf-8"))
    entries: Entries = listing["tensors"]
    table = base(description.about["base"]).table(description.config)
    params = StoredParts(source, listing).tree()
    work = destination.with_name(f".{destination.name}.exporting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        shutil.copytree(source / SOURCE, work)
        shards = plan_shards(entries)
        write_shards(work, shards, entries, _tensors(table, params, entries))
        reach_the_disk(work)
        if destination.exists():
            destination.rmdir()  # it is empty
        work.rename(destination)
    except OSError as error:
        raise ZooError(
            f"the checkpoint could not be written to {destination}: {error.strerror or error}; "
            "make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(
        str(destination), len(entries), sum(map(nbytes, entries.values())), tuple(shards)
    )


def plan_shards(entries: Entries) -> dict[str, list[str]]:
    """{file: tensors in it}, in the order of the names."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(entries):
        need = nbytes(entries[name])
        if size + need > SHARD_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += need
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    last = len(groups)
    return {f"model-{n:05}-of-{last:05}.safetensors": group for n, group in enumerate(groups, 1)}


def _tensors(
    table: Table, params: Mapping[str, Any], entries: Entries
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the original, in its dtype.

    Raises:
      ZooError: one is not, bit by bit, what it was.
    """
    names: dict[str, list[str]] = {}
    for name, entry in entries.items():
        key = table.aliases.get(entry["key"], entry["key"])
        names.setdefault(key, []).append(name)
    for made in table.unstream(params):
        for key, array in made.items():
            for name in names[key]:
                entry = entries[name]
                exact = array.astype(DTYPES[entry["dtype"]], copy=False)
                if sha256(exact) != entry["sha256"]:
                    raise ZooError(f"{name} is not what it was when it was converted")
                yield name, exact


def write_shards(
    folder: Path,
    shards: Mapping[str, list[str]],
    entries: Entries,
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Write files whose tensors arrive in any order.

    Raises:
      OSError: there is no room for them, before any is asked for; or a write fails.
    """
    need, free = sum(map(nbytes, entries.values())), shutil.disk_usage(folder).free
    if need > free:
        raise OSError(ENOSPC, f"{free:,} bytes are left and the weights need {need:,}")
    with ExitStack() as stack:
        places = {}
        for file, names in shards.items():
            out = stack.enter_context(open(folder / file, "wb"))
            listed = {
                name: (DTYPES[entries[name]["dtype"]], tuple(entries[name]["shape"]))
                for name in names
            }
            places |= {name: (out, start) for name, start in write_header(out, listed).items()}
        for name, array in tensors:
            out, start = places[name]
            out.seek(start)
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        home = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": need}, "weight_map": dict(sorted(home.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def nbytes(entry: Mapping[str, Any]) -> int:
    """Of a tensor."""
    return math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
