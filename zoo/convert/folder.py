"""The weights in a Hugging Face checkpoint folder, in one file or in shards."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.convert.pickled import read_pickled
from zoo.convert.safetensors import read_safetensors
from zoo.convert.tensor import Tensor
from zoo.models.core.errors import ZooError
from zoo.models.core.registry import base_index

CONFIG = "config.json"

_TIMM = "timm_wrapper"
"""The model type by which transformers calls all of timm's models."""

WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.safetensors.index.json", "*.bin.index.json")
"""Patterns of the files that hold weights, and of their indices."""

_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_checkpoint(folder: Path) -> bool:
    """Whether `config.json` names an architecture, as those of the Hugging Face hub do."""
    try:
        return "model_type" in _named(json.loads((folder / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def has_weights(folder: Path) -> bool:
    """Whether there are files of weights, usable or not, such as a checkpoint has."""
    return any(next(folder.glob(pattern), None) is not None for pattern in WEIGHTS)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, with a `model_type` where it is one of timm's, which has none.

    Raises:
      ZooError: it cannot be read, or names no architecture.
    """
    file = folder / CONFIG
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ZooError(
            f"{folder} {what}: name the folder of a checkpoint, or one on the Hugging Face hub"
        )
    try:
        config = _named(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        raise ZooError(f"{file} is missing: a checkpoint has one beside its weights") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"{file} cannot be read: {error}") from error
    if "model_type" not in config:
        raise ZooError(f"{file} names no model_type, so nobody knows which architecture this is")
    return config


def _named(config: Any) -> dict[str, Any]:
    """A configuration that names its `model_type`; {} if this is none."""
    if not isinstance(config, dict):
        return {}
    kind, architecture = config.get("model_type"), config.get("architecture")
    if isinstance(architecture, str) and (
        kind == _TIMM or (kind is None and "pretrained_cfg" in config)
    ):
        return {**config, "model_type": _timm_type(architecture)}
    return config if isinstance(kind, str) else {}


def _timm_type(architecture: str) -> str:
    """The model type that stands for a family of timm's, such as "timm_resnet" for `resnet50`,
    where an architecture here is called so.
    """
    family = re.match("[a-z]*", architecture)
    name = f"timm_{family[0] if family else ''}"
    known = any(name in row["model_types"] for row in base_index().values())
    return name if known else _TIMM


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, unread.

    `model.safetensors`, its index, `pytorch_model.bin`, its index: the first of these that is
    there; else the only `*.safetensors`, `*.bin` or `*.pth` file.

    Raises:
      ZooError: there are no weights or several, or a file of them is absent, damaged, or
        contradicts the index.
    """
    name = next((name for name in _NAMES if (folder / name).is_file()), None)
    if name is not None:
        file = folder / name
        return _sharded(file) if name.endswith(".index.json") else _reader(file)(file)
    found = sorted(file for pattern in WEIGHTS[:3] for file in folder.glob(pattern))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found)
        what = f"several and no index: {listed}" if found else "none"
        raise ZooError(f"{folder}: want weights in one of {', '.join(_NAMES)}; found {what}")
    return _reader(found[0])(found[0])


def _reader(file: Path) -> Callable[[Path], dict[str, Tensor]]:
    return read_safetensors if file.suffix == ".safetensors" else read_pickled


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index names, which must be exactly those that it lists."""
    shard_of = _shards(index)
    out: dict[str, Tensor] = {}
    for name in sorted(set(shard_of.values())):
        file = index.parent / name
        shard = _reader(file)(file)
        listed = {key for key, home in shard_of.items() if home == name}
        problems = [f"{key} is not in {name}" for key in sorted(listed - shard.keys())]
        problems += [f"{key} is in {name} unlisted" for key in sorted(shard.keys() - listed)]
        if problems:
            raise ZooError(f"{index} does not fit its shards:\n  " + "\n  ".join(problems))
        out |= shard
    return out


def _shards(index: Path) -> dict[str, str]:
    """{tensor: name of its shard}, every shard a file in the folder of the index."""
    try:
        shard_of = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ZooError(f"{index} is no index of shards: {error}") from error
    if not isinstance(shard_of, dict) or not shard_of:
        raise ZooError(f"{index} is no index of shards: its weight_map is no object, or empty")
    for name in shard_of.values():
        # Compared by its text: in a cache of the hub the shard itself is a link to elsewhere.
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ZooError(f"{index} names {name!r}: want files in its own folder only")
    absent = sorted({name for name in shard_of.values() if not (index.parent / name).is_file()})
    if absent:
        listed = "\n  ".join(absent)
        raise ZooError(f"{index} names shards that are not there; download them:\n  {listed}")
    return shard_of
