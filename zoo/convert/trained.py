"""What training has made, in the Hugging Face layout."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from zoo.convert.adapter import CONFIG, WEIGHTS
from zoo.convert.checkpoint import Checkpoint, open_checkpoint
from zoo.convert.convert import copy_source
from zoo.convert.export import Exported, nbytes, plan_shards, write_shards
from zoo.convert.folder import is_checkpoint
from zoo.convert.hub import folder_of
from zoo.convert.place import together
from zoo.convert.safetensors import read_safetensors
from zoo.convert.tensor import DTYPES, NAMES
from zoo.loading import load
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.keytable import Table
from zoo.saving import ADAPTER, MODEL, PARAMS
from zoo.whole import reach_the_disk


def is_trained(source: str | Path) -> bool:
    """Whether a folder is that of a run, or of the model that it has left."""
    return any((folder / PARAMS).is_file() for folder in (Path(source), Path(source) / MODEL))


def export_trained(source: str | Path, destination: str | Path) -> Exported:
    """Write the model of a run as a Hugging Face checkpoint.

    Its configuration, tokenizer and all else but the weights are those of the checkpoint that
    training started from; tensors have the dtypes that they have there.

    Args:
      source: the folder of a run, or of its model.
      destination: a folder that is not there yet, or empty.

    Raises:
      UsageError: training did not start from one checkpoint, or has made another architecture of
        it; or the destination holds other things.
      ZooError: a folder is damaged, or the destination cannot be written; then nothing is there.
    """
    destination = _free(destination)
    loaded = load(source)
    starts = loaded.about.get("start", [])
    theirs = _checkpoint(starts[0]) if len(starts) == 1 else None
    if theirs is None:
        raise UsageError(
            f"{source} was trained from {', '.join(starts) or 'nothing'}: only what started from "
            "one Hugging Face checkpoint has its configuration"
        )
    table, tree = theirs.table, together(loaded.params, loaded.stats)
    try:
        fits = table.shapes(tree) == table.shapes(nn.unbox(theirs.boxed))
    except ZooError:
        fits = False
    if not fits or type(loaded.config) is not type(theirs.config):
        raise UsageError(
            f"{source} is another architecture than {starts[0]}: it has no place in that layout"
        )
    tensors = theirs.layout.tensors
    entries = {
        name: {"key": key, "dtype": NAMES[tensors[key].dtype], "shape": list(tensors[key].shape)}
        for name, key in theirs.layout.names.items()
        if key is not None
    }
    work = destination.with_name(f".{destination.name}.exporting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        copy_source(theirs.folder, work)
        shards = plan_shards(entries)
        write_shards(work, shards, entries, _tensors(table, tree, entries))
        _finish(work, destination)
    except OSError as error:
        raise _failed(destination, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(
        str(destination), len(entries), sum(map(nbytes, entries.values())), tuple(shards)
    )


def export_adapter(source: str | Path, destination: str | Path) -> Exported:
    """Copy the adapters of a run, in the layout of `peft`.

    Args:
      source: the folder of the run.
      destination: a folder that is not there yet, or empty.

    Raises:
      UsageError: the run has none, or the destination holds other things.
      ZooError: the destination cannot be written; then nothing is there.
    """
    folder, destination = Path(source) / ADAPTER, _free(destination)
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{source} has no {ADAPTER}/: its log says why, or it has trained none")
    work = destination.with_name(f".{destination.name}.exporting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        shutil.copytree(folder, work)
        _finish(work, destination)
    except OSError as error:
        raise _failed(destination, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tensors = read_safetensors(destination / WEIGHTS)
    size = sum(leaf.nbytes for leaf in map(np.asarray, tensors.values()))
    return Exported(str(destination), len(tensors), size, (WEIGHTS,))


def _checkpoint(source: str) -> Checkpoint | None:
    folder = folder_of(source)
    return open_checkpoint(folder) if is_checkpoint(folder) else None


def _tensors(table: Table, params: Any, entries: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the checkpoint, in its dtype."""
    names: dict[str, list[str]] = {}
    for name, entry in entries.items():
        names.setdefault(table.aliases.get(entry["key"], entry["key"]), []).append(name)
    for made in table.unstream(params):
        for key, array in made.items():
            for name in names.get(key, ()):
                yield name, array.astype(DTYPES[entries[name]["dtype"]], copy=False)


def _free(destination: str | Path) -> Path:
    destination = Path(destination).absolute()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} exists: choose a folder that is new or empty")
    return destination


def _finish(work: Path, destination: Path) -> None:
    reach_the_disk(work)
    if destination.exists():
        destination.rmdir()  # it is empty
    work.rename(destination)


def _failed(destination: Path, error: OSError) -> ZooError:
    return ZooError(
        f"nothing could be written to {destination}: {error.strerror or error}; make room or "
        "choose another folder"
    )
