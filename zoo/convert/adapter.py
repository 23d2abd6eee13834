"""Low-rank adapters as folders in the layout of the library `peft`.

    adapter_config.json         rank, alpha and the modules that have an adapter
    adapter_model.safetensors   "base_model.model.<module>.lora_A.weight" [R, in] and
                                "….lora_B.weight" [out, R]

The names of modules are those of transformers; they follow from the key table of the architecture.
Where one module of theirs is several maps of ours, such as queries, keys and values, its adapter is
made of theirs side by side: its rank is the sum of theirs.
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from zoo.convert.place import cast_to, flat_paths, nested, put, shardings_of
from zoo.convert.safetensors import read_safetensors
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.keytable import Row, Shape, Table, instances
from zoo.models.core.registry import Base
from zoo.models.parts.layers.linear import LinearKernel
from zoo.models.parts.layers.low_rank import SCALE, A, B, adapters, linear_kernels
from zoo.models.parts.layers.operands import LowRank, is_operand
from zoo.whole import reach_the_disk

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}

_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
"""Fields that say how an adapter was made, or which modules have one, which its tensors say too."""


def write_adapter(
    folder: str | Path, params: Mapping[str, Any], home: Base, config: Any, source: str
) -> Path:
    """Write the adapters of a model; `folder` then holds them in place of what it held before.

    Args:
      folder: a new folder, or one that an earlier call has written.
      params: parameters with operands, see `zoo.models.parts.layers.low_rank.attach`.
      home: the architecture.
      config: of the model.
      source: the checkpoint that the adapters belong to, for readers.

    Raises:
      UsageError: there are no adapters, or one belongs to a map that has no module of its own.
      ZooError: they could not be written; what was there before is untouched.
    """
    tensors, scales = _tensors(params, home.table(config), home.modules)
    if not tensors:
        raise UsageError("the model has no low-rank adapters to write")
    ranks = {
        module: tensors[f"{_PREFIX}{module}.lora_A.weight"].shape[0] for module in sorted(scales)
    }
    alphas = {module: _plain(scales[module] * rank) for module, rank in ranks.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": source,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    folder = Path(folder).absolute()
    new, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        (new / CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # the library lets nobody else read it
        reach_the_disk(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ZooError(
            f"the adapter could not be written to {folder}: {error.strerror or error}; make room "
            "or choose another folder"
        ) from error
    return folder


def read_adapter(
    folder: str | Path,
    params: Mapping[str, Any],
    boxed: Any,
    home: Base,
    config: Any,
    mesh: Mesh | None,
    dtype: np.dtype | None,
) -> Any:
    """Parameters with the adapters of a folder as operands in place of the kernels.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      params: of the model that the adapters belong to; stacked kernels may be tuples of rows.
      boxed: their shapes and names.
      home: the architecture.
      config: of the model.
      mesh: devices to lay the adapters out on; None: one.
      dtype: of the adapters; None for that in the file.

    Raises:
      UsageError: the adapter is of a kind, or has a setting, that is not understood.
      ZooError: a file is missing or damaged, or does not fit the model.
    """
    folder = Path(folder)
    settings = _settings(folder)
    tensors = read_safetensors(folder / WEIGHTS)
    kernels = linear_kernels(boxed)
    found = list(_pieces(folder, tensors, settings, home, config, kernels))
    paths = sorted({piece.path for piece in found})
    ranks = {path: max(p.a.shape[-1] for p in found if p.path == path) for path in paths}
    shapes: dict[str, Any] = {}
    for path, rank in ranks.items():
        shapes |= flat_paths(adapters({path: kernels[path]}, rank))
    where = shardings_of(nested(shapes), mesh)
    arrays = _stacked(found, shapes)
    placed = {
        path: put(array, cast_to(array.dtype, dtype), where[path]) for path, array in arrays.items()
    }
    flat = flat_paths(params)
    if gone := sorted(set(paths) - flat.keys()):
        raise UsageError(f"{folder} has an adapter of {gone[0]}, which these settings leave out")
    for path in paths:
        parent = path.rpartition("/")[0]
        parts = (placed[f"{parent}/{name}"] for name in (A, B, SCALE))
        flat[path] = _operand(flat[path], *parts)
    return nested(flat)


@dataclass(frozen=True)
class _Own:
    """An operand without its base, on the host."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, operand: LowRank) -> "_Own":
        return cls(*map(np.asarray, (operand.a, operand.b, operand.scale)))


@dataclass(frozen=True)
class _Piece:
    """The adapter of one map: of `path`, in row `row` if that is stacked."""

    path: str
    row: int | None
    a: np.ndarray
    b: np.ndarray
    scale: float


def _operand(kernel: Any, a: jax.Array, b: jax.Array, scale: jax.Array) -> Any:
    """The operand of a kernel, or those of its rows."""
    if isinstance(kernel, tuple):
        return tuple(LowRank(row, a[i], b[i], scale[i]) for i, row in enumerate(kernel))
    return LowRank(kernel, a, b, scale)


def _stacked(found: Sequence[_Piece], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{path: array} of all parts of the adapters; rows without one are zero."""
    out: dict[str, np.ndarray] = {}
    for piece in found:
        parent, at = piece.path.rpartition("/")[0], ... if piece.row is None else piece.row
        rank = piece.a.shape[-1]
        for name, array in ((A, piece.a), (B, piece.b), (SCALE, np.float32(piece.scale))):
            path = f"{parent}/{name}"
            dtype = np.dtype(np.float32) if name == SCALE else array.dtype
            whole = out.setdefault(path, np.zeros(shapes[path].value.shape, dtype))[at]
            if name == A:
                whole[..., :rank] = array
            elif name == B:
                whole[:rank] = array
            else:
                out[path][at] = array
    return out


def _settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, whose fields are all understood."""
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ZooError(f"{file} cannot be read: {error}") from error
    if settings.get("peft_type") != "LORA":
        raise UsageError(f"{file}: peft_type is {settings.get('peft_type')!r}: want 'LORA'")
    neutral = (None, False, "none", [], {}, "")
    for name, value in settings.items():
        if name not in _READ | _HARMLESS and value not in neutral:
            raise UsageError(
                f"{file}: {name} is {value!r}, which may change the numbers and is not understood"
            )
    found: dict[str, Any] = settings
    return found


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / rank of a module, which patterns may name."""
    alpha = settings["lora_alpha"]
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _pieces(
    folder: Path,
    tensors: Mapping[str, Any],
    settings: Mapping[str, Any],
    home: Base,
    config: Any,
    kernels: Mapping[str, LinearKernel],
) -> Iterator[_Piece]:
    """The adapters in a file, each as ours."""
    homes = {
        keys[0]: (row, r, paths)
        for row in home.table(config).rows
        if isinstance(row, Row)
        for r, paths, keys in instances(row)
        if len(keys) == 1
    }
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    named = {f"{m}.lora_{part}.weight" for m in modules for part in "AB"}
    if unknown := sorted(tensors.keys() ^ named):
        raise ZooError(f"{folder / WEIGHTS}: {unknown[0]} is missing, or is no part of LoRA")
    for module in modules:
        key = module.removeprefix(_PREFIX) + ".weight"
        for pattern, replacement in home.renames:
            key = re.sub(pattern, replacement, key)
        row, r, paths = homes.get(key, (None, None, ()))
        if row is None or not all(path in kernels for path in paths):
            raise ZooError(f"{folder}: {module} is no linear map of this model ({key})")
        a, b = (np.asarray(tensors[f"{module}.lora_{part}.weight"]) for part in "AB")
        rank = a.shape[0]
        scale = _scale(settings, module.removeprefix(_PREFIX), rank)
        sides = [_sides(kernels[path]) for path in paths]
        shapes = [(rank, *(1,) * (len(ins) - 1), *outs) for ins, outs in sides]
        try:
            parts = row.transform.load([b], shapes)
            for path, part, (ins, outs) in zip(paths, parts, sides, strict=True):
                own = a.T.reshape(*ins, rank)
                yield _Piece(path, r, own, np.asarray(part).reshape(rank, *outs), scale)
        except ValueError as error:
            raise ZooError(
                f"{folder}: the adapter of {module}, {a.shape} and {b.shape}, does not fit: {error}"
            ) from error


def _sides(box: LinearKernel) -> tuple[Shape, Shape]:
    """The input and the output axes of a map, without those of stacked layers."""
    shape = tuple(box.value.shape)
    lead = len(shape) - box.num_in - box.num_out
    return shape[lead : lead + box.num_in], shape[lead + box.num_in :]


def _tensors(
    params: Mapping[str, Any], table: Table, modules: Sequence[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """{name: tensor} in their layout, and {module: scale}."""
    everything = flat_paths(params)
    flat = {
        path: tuple(map(_Own.of, leaf)) if isinstance(leaf, tuple) else _Own.of(leaf)
        for path, leaf in everything.items()
        if is_operand(leaf[0] if isinstance(leaf, tuple) else leaf)
    }
    tensors: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}
    written: set[str] = set()
    for row in table.rows:
        if not isinstance(row, Row):
            continue
        for r, paths, keys in instances(row):
            ours = [_of_row(flat.get(path), r) for path in paths]
            if not any(ours):
                continue
            if len(keys) > 1 or not keys[0].endswith(".weight"):
                raise UsageError(f"the adapter of {paths[0]} has no module of its own: {keys}")
            written |= set(paths)
            module = keys[0].removesuffix(".weight")
            for pattern, replacement in modules:
                module = re.sub(pattern, replacement, f"{module}.").removesuffix(".")
            a, b, scale = _joined(row, ours, [_shape(everything[path], r) for path in paths])
            if a.any() or b.any():  # rows of a stack that have none are zero
                tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
                tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
                scales[module] = scale
    if left := sorted(flat.keys() - written):
        raise UsageError(f"the adapter of {left[0]} belongs to no tensor of the key table")
    return tensors, scales


def _joined(
    row: Row, ours: Sequence["_Own | None"], shapes: Sequence[Shape]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Their A [R, in], B [out, R] and scale of the adapters of one module of theirs."""
    there = [each for each in ours if each is not None]
    scale = float(there[0].scale)
    first = there[0].a
    num_in = first.ndim - 1
    inputs = first.shape[:-1]
    same = len(there) == len(ours) and all(np.array_equal(each.a, first) for each in there)
    blocks = [each.a for each in (there[:1] if same else there)]
    a = np.concatenate([each.reshape(-1, each.shape[-1]) for each in blocks], 1)
    rank, before, parts = a.shape[1], 0, []
    for each, shape in zip(ours, shapes, strict=True):
        outs = shape[len(inputs) :]
        b = np.zeros((rank, *outs), first.dtype)
        if each is not None:
            own = each.a.shape[-1]
            b[before : before + own] = each.b * np.asarray(float(each.scale) / scale, first.dtype)
            before += 0 if same else own
        parts.append(b.reshape(rank, *(1,) * (num_in - 1), *outs))
    try:
        [theirs] = row.transform.save(parts)
    except ValueError:
        theirs = parts[0]
    if theirs.shape != (sum(math.prod(shape[len(inputs) :]) for shape in shapes), rank):
        raise UsageError(f"the adapter of {row.paths} belongs to no linear module ({row.keys})")
    return np.ascontiguousarray(a.T), np.ascontiguousarray(theirs), scale


def _of_row(leaf: Any, row: int | None) -> "_Own | None":
    """The adapter of one layer, None where there is none."""
    if leaf is None or row is None:
        return leaf
    if not isinstance(leaf, _Own):
        return leaf[row]
    return _Own(leaf.a[row], leaf.b[row], leaf.scale[row])


def _shape(leaf: Any, row: int | None) -> Shape:
    """The shape of a kernel, or of one of its rows."""
    if isinstance(leaf, tuple):
        return tuple(leaf[0].shape)
    return tuple(leaf.shape if row is None else leaf.shape[1:])


def _plain(value: float) -> float | int:
    """A number as it would be written: whole ones without a point."""
    return int(value) if value == int(value) else value
