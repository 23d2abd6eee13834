"""A model from wherever it is, ready to be asked: a training run, a converted checkpoint, a Hugging
Face checkpoint in a folder or on the hub.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from zoo.convert.adapter import read_adapter
from zoo.convert.checkpoint import Checkpoint, open_checkpoint
from zoo.convert.folder import has_weights, is_checkpoint, read_config
from zoo.convert.hub import folder_of
from zoo.convert.parts import StoredParts
from zoo.convert.place import (
    STATS,
    abstract_variables,
    apart,
    as_float,
    flat_paths,
    nested,
    place,
    shardings_of,
)
from zoo.convert.safetensors import read_safetensors
from zoo.convert.transfer import plan_transfer
from zoo.loaded import Loaded
from zoo.models.core.config import ModelConfig, with_dtype
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.keytable import Piece
from zoo.models.core.registry import Base, base, override
from zoo.processors.pictures import PICTURES, Pictures
from zoo.processors.vlm import Processor
from zoo.saving import CONFIG, MODEL, PARAMS, SOURCE, STATS_FILE, TENSORS, read_description
from zoo.whole import MANIFEST

_PROCESSING = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
)
"""A checkpoint with none of these files comes without a processor."""


def load(
    source: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    seed: int = 0,
    adapter: str | Path | None = None,
    **overrides: Any,
) -> Loaded:
    """Load a model, or its weights into another one.

        zoo.load("llava-hf/llava-1.5-7b-hf", connector=MQT(), policies=(PMoD(),))

    With settings that differ from the checkpoint's, every parameter of the checkpoint still goes
    where it belongs. What a policy adds, and a part whose configuration is of another class, starts
    as the module's own initialisation makes it; `about` then lists these parameters under "new",
    and those of the checkpoint that have no place any more under "unused". A difference anywhere
    else, such as another depth, is an error.

    Args:
      source: the folder of a training run, of what `zoo convert` has made, or of a Hugging Face
        checkpoint; or the name of one on the hub, "organisation/name" or
        "organisation/name@revision".
      mesh: devices to lay the parameters out on, with axes named as in
        `zoo.models.core.names.MESH_AXES`; by default all lie on one device. On a CPU, stacked
        parameters are then tuples of rows, which is faster there and which every module takes;
        `zoo.models.parts.layers.stack.restack` makes arrays of them.
      dtype: "float32", "bfloat16" or "float16", of parameters and computation. By default
        parameters keep the dtype that they are stored in, and what is computed from them is
        float32. New parameters are float32 by default, running statistics always.
      seed: of new parameters.
      adapter: a folder, or a name on the hub, with low-rank adapters in the layout of `peft` for
        this model; they stand beside its kernels, see `zoo.models.parts.layers.operands`, of which
        `merge` makes one array each.
      **overrides: settings of the model, as `zoo.create` takes them.

    Raises:
      UsageError: a dtype that is none of these; an architecture or a setting that is not
        understood; settings that the checkpoint's parameters do not fit.
      ZooError: there is no model (of an unfinished training, with how far it is), or it is damaged,
        of another version, or not the one that its configuration describes.
    """
    target = as_float(dtype)
    folder, theirs, config, about = _open(source)
    stored = config
    try:
        config = override(config, overrides, str(source))
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    if target is not None:
        stored, config = (with_dtype(each, target.name) for each in (stored, config))
    boxed = abstract_variables(stored)
    if theirs is not None:
        pieces = theirs.pieces()
    elif (folder / TENSORS).is_file():
        pieces = _converted(folder, boxed)
    else:
        pieces = _saved(folder, boxed)
    # Where cutting a row out of a stacked parameter would copy it.
    in_rows = mesh is None and jax.default_backend() == "cpu"
    if config == stored:
        tree = place(pieces, shardings_of(boxed, mesh), target, in_rows=in_rows)
    else:
        plan = plan_transfer(stored, config, source)
        shardings = shardings_of(plan.boxed, mesh)
        tree = place(plan.carried(pieces), shardings, target, in_rows=in_rows)
        fresh = plan.fresh(seed, shardings, target)
        tree = nested(flat_paths(tree) | fresh)
        about = {**about, "new": sorted(fresh), "unused": sorted(plan.unused)}
    params, stats = apart(tree)
    if adapter is not None:
        home = architecture(stored, about)
        given = (folder_of(adapter), params, apart(boxed)[0], home, stored, mesh, target)
        params, about = read_adapter(*given), {**about, "adapter": str(adapter)}
    processor = _processor(folder, config)
    return Loaded(folder, config, config.build(), params, processor, about, stats)


def config_of(source: str | Path, dtype: Any = None) -> ModelConfig:
    """The configuration of a model, none of whose weights is read; as `load`, without overrides."""
    target, config = as_float(dtype), _open(source)[2]
    return config if target is None else with_dtype(config, target.name)


def architecture(config: ModelConfig, about: Mapping[str, Any]) -> Base:
    """The architecture of the Hugging Face hub that a model is of, or was trained from.

    Args:
      config: of the model.
      about: what is known about it, as in `Loaded.about`.

    Raises:
      UsageError: it is of none, or of none that has a place for all of it.
    """
    start = about.get("start", [])
    if "base" not in about and len(start) == 1:
        return architecture(config, _open(start[0])[3])
    found = base(about["base"]) if "base" in about else None
    if found is None or all(type(known) is not type(config) for known in found.variants.values()):
        raise UsageError(
            "the model is no checkpoint of the Hugging Face hub, and was not trained from one: "
            "only adapters of these have a layout"
        )
    return found


def _open(
    source: str | Path,
) -> tuple[Path, Checkpoint | None, ModelConfig, dict[str, Any]]:
    """The folder of a model, as a Hugging Face checkpoint if it is one, its configuration and what
    is known about it.
    """
    folder = _find(folder_of(source))
    if is_checkpoint(folder):
        theirs = open_checkpoint(folder)
        about = {"source": str(source), "base": theirs.base.slug}
        return folder, theirs, theirs.config, about
    description = read_description(folder)
    return folder, None, description.config, description.about


def _processor(folder: Path, config: ModelConfig) -> Any:
    """The processor that belongs to the model; None where its files are not there."""
    if (folder / "processor.json").is_file():
        return Processor.load(folder)
    if (folder / PICTURES).is_file():
        return Pictures.load(folder)
    source = folder / SOURCE if (folder / SOURCE).is_dir() else folder
    if not any((source / name).is_file() for name in _PROCESSING):
        return None
    from zoo.processors.hf import load_processor

    return load_processor(source, config)


def _converted(folder: Path, boxed: Any) -> Iterator[Piece]:
    """The parameters of a converted checkpoint."""
    stored = StoredParts(folder, json.loads((folder / TENSORS).read_text("utf-8")))
    _check(folder / TENSORS, {path: shape for path, (shape, _) in stored.leaves.items()}, boxed)
    return stored.pieces()


def _saved(folder: Path, boxed: Any) -> Iterator[Piece]:
    """What `save_model` has written, each array as one piece."""
    tensors = read_safetensors(folder / PARAMS)
    if (folder / STATS_FILE).is_file():
        stats = read_safetensors(folder / STATS_FILE)
        tensors |= {f"{STATS}/{path}": tensor for path, tensor in stats.items()}
    _check(folder / PARAMS, {path: tensor.shape for path, tensor in tensors.items()}, boxed)

    def read(path: str) -> dict[str, np.ndarray]:
        return {path: np.asarray(tensors[path])}

    for path, tensor in tensors.items():
        leaves = {path: (tensor.shape, tensor.dtype)}
        yield Piece(leaves, None, (path,), partial(read, path))


def _check(file: Path, found: Mapping[str, tuple[int, ...]], boxed: Any) -> None:
    """Raise ZooError unless `found` are exactly the shapes that the configuration asks for."""
    wanted = {path: leaf.shape for path, leaf in flat_paths(nn.unbox(boxed)).items()}
    problems = [f"  {path} is missing" for path in sorted(wanted.keys() - found.keys())]
    problems += [f"  {path} is not in the model" for path in sorted(found.keys() - wanted.keys())]
    problems += [
        f"  {path} is {found[path]}, want {wanted[path]}"
        for path in sorted(wanted.keys() & found.keys())
        if found[path] != wanted[path]
    ]
    if problems:
        listed = "\n".join(problems)
        raise ZooError(f"{file} does not fit the model that {CONFIG} describes:\n{listed}")


def _find(folder: Path) -> Path:
    """The folder of the model: `folder` itself, or a part of the run that it belongs to."""
    if (folder / MANIFEST).is_file():
        return folder
    if (folder / MODEL).is_dir():
        return folder / MODEL
    if is_checkpoint(folder):
        return folder
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ZooError(
            f"{folder} {what}: name the folder of a training run or of a checkpoint, or a model on "
            "the Hugging Face hub"
        )
    if (folder / PARAMS).is_file() or (folder / TENSORS).is_file():
        return folder  # one of ours that is not whole, of which its reader says what is missing
    if has_weights(folder):
        read_config(folder)  # raises: what is there configures no checkpoint
    checkpoints = [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    if not checkpoints and not (folder / "metrics.jsonl").exists():
        raise ZooError(
            f"{folder} holds no model: name the folder of a training run or of a checkpoint"
        )
    step = max(map(int, checkpoints), default=0)
    raise ZooError(
        f"{folder} holds no finished model yet: {_progress(folder, step)}; run the same training "
        "command again to finish it"
    )


def _progress(folder: Path, step: int) -> str:
    try:
        steps = int(json.loads((folder / "config.json").read_text("utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its training has reached step {step}"
    return f"its training has reached step {step} of {steps}"
