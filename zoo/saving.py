"""A model as a folder that needs nothing else.

    config.json          layout version, configuration, cards of the systems in it, where it is from
    params.safetensors   parameters, named "decoder/stack/layers/q/kernel"
    stats.safetensors    running statistics, named alike, of a model that keeps some
    processor.json, tokenizer.json   how pictures and text become arrays
    manifest.json        length and digest of all files

`zoo.load` reads it, see `zoo.loading`. A converted checkpoint is such a folder too, with the
parameters in parts and the original's processor files, see `zoo.convert.convert`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError
from safetensors.flax import save_file

from zoo.models.core import registry
from zoo.models.core.codec import CLASS, decode, encode
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import ZooError
from zoo.models.core.tree import flatten_dict
from zoo.processors.vlm import Processor
from zoo.whole import check, reach_the_disk, write_manifest

MODEL = "model"
"""Name of the model's folder in the folder of a run."""

ADAPTER = "adapter"
"""Name of the folder of low-rank adapters beside it, in the layout of `peft`."""

LAYOUT = 1
"""Version of the form described above; another one is refused."""

PARAMS, STATS_FILE, CONFIG = "params.safetensors", "stats.safetensors", "config.json"

PARTS, TENSORS, SOURCE = "params", "tensors.json", "source"
"""What a converted checkpoint has in place of `PARAMS` and of the processor's files."""


def save_model(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    processor: Processor,
    about: Mapping[str, Any],
    stats: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model; `folder` then holds all of it, in place of what it held before.

    Args:
      folder: a new folder, or one that an earlier call has written.
      config: builds the module.
      params: its unboxed parameters.
      processor: how pictures and text become its inputs.
      about: plain facts worth keeping, such as the experiment and the step.
      stats: its running statistics, where it keeps some.

    Raises:
      ZooError: it could not be written; what was there before is untouched.
    """
    folder = Path(folder).absolute()
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    settings = encode(config)
    described = {
        "layout": LAYOUT,
        "model": settings,
        "cards": [asdict(registry.card(slug)) for slug in _systems(settings)],
        "about": dict(about),
    }
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        (new / CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        for name, tree in ((PARAMS, params), (STATS_FILE, stats)):
            if tree:
                flat = flatten_dict(jax.device_get(tree)).items()
                named = {"/".join(path): leaf for path, leaf in flat}
                save_file(named, new / name, metadata={"layout": str(LAYOUT)})
                shutil.copymode(new / CONFIG, new / name)  # the library lets nobody else read it
        processor.save(new)
        write_manifest(new)
        reach_the_disk(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise ZooError(
            f"the model could not be written to {folder}: {reason}; make room or choose another "
            "folder, and run the same command again"
        ) from error
    return folder


@dataclass(frozen=True)
class Description:
    """What a folder says about its model: its configuration, and where it is from."""

    config: ModelConfig
    about: dict[str, Any]


def read_description(folder: Path) -> Description:
    """Read `config.json` of a model's folder, after all of its files have been checked.

    Raises:
      ZooError: the folder is not whole, is damaged, of another version, or describes no model.
    """
    if problem := check(folder):
        again = (
            "convert the checkpoint" if (folder / SOURCE).is_dir() else "run the training command"
        )
        raise ZooError(
            f"the model in {folder} cannot be used: {problem}; copy it again, or delete it and "
            f"{again} again, which writes it anew"
        )
    file = folder / CONFIG
    described = json.loads(file.read_text("utf-8"))
    if described.get("layout") != LAYOUT:
        raise ZooError(
            f"{file}: its layout is {described.get('layout')!r} and this version reads {LAYOUT}: "
            "load it with the version that wrote it"
        )
    config = decode(described["model"])
    if not isinstance(config, ModelConfig):
        raise ZooError(f"{file} describes no model")
    return Description(config, described["about"])


def saved_about(folder: str | Path) -> Mapping[str, Any] | None:
    """What `save_model` was told about the model in `folder`; None if no whole model is there."""
    if check(Path(folder)) is not None:
        return None
    about: Mapping[str, Any] = json.loads((Path(folder) / CONFIG).read_text("utf-8"))["about"]
    return about


def _systems(settings: Any) -> list[str]:
    """Slugs of the systems that an encoded configuration is made of."""
    homes = {row["module"]: slug for slug, row in registry.index().items()}
    modules = {name.rpartition(".")[0] for name in _classes(settings)}
    return sorted(slug for home, slug in homes.items() if home in modules)


def _classes(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        yield tree[CLASS]
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _classes(value)
