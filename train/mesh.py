"""The mesh of devices, and how parameters and batches lie on it."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zoo.models.core.errors import UsageError
from zoo.models.core.names import MESH_AXES, use_rules
from zoo.train.data.share import Share, share_of

BATCH_AXES = ("data", "fsdp", "expert")
"""The axes of the mesh that the examples of a batch are divided over."""

SHARDED_ENOUGH = 0.95
"""The least share of the bytes of the parameters that should be divided on a mesh with `fsdp`."""


@dataclass(frozen=True)
class AxisRule:
    """Where the axes of arrays that are called `name` lie, in place of `DEFAULT_RULES`.

    Attributes:
      name: a logical name, such as "embed", see `zoo.models.core.names`.
      axes: the axes of the mesh that they are divided over; none: every device has all of them.
    """

    name: str
    axes: tuple[str, ...] = ()


ALONG_SEQUENCE = (
    AxisRule("embed", ("fsdp", "seq")),
    AxisRule("vocab", ("tensor", "fsdp", "seq")),
    AxisRule("conv_out", ("fsdp", "seq")),
)
"""Rules by which the devices that share a sequence share the parameters too."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; -1, for one axis, takes all that remain.

    Attributes:
      data: copies of the model, each with its own part of the batch.
      fsdp: parts of the batch among which the parameters are divided too.
      tensor: parts of every layer.
      seq: parts of the sequence; attention exchanges them for parts of its heads.
      expert: parts of the experts, and of the batch.
      rules: changes to where the axes of arrays lie; `ALONG_SEQUENCE` is a set of such.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    seq: int = 1
    expert: int = 1
    rules: tuple[AxisRule, ...] = ()

    def __post_init__(self) -> None:
        sizes = tuple(self.sizes.values())
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UsageError(
                f"mesh is {sizes}: want sizes of 1 or more, and -1 for one axis at most"
            )
        try:
            with self.ruled():
                pass
        except ValueError as error:
            raise UsageError(f"mesh.rules: {error}") from error

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, -1 where the rest goes."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def over(self, devices: int) -> "MeshConfig":
        """The same with the number that -1 stands for on so many devices."""
        rest = devices // math.prod(size for size in self.sizes.values() if size != -1)
        sizes = {axis: rest if size == -1 else size for axis, size in self.sizes.items()}
        return replace(self, **sizes)

    @contextlib.contextmanager
    def ruled(self) -> Iterator[None]:
        """Let `rules` be in force."""
        with use_rules({rule.name: rule.axes for rule in self.rules}):
            yield


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with the axes `data fsdp tensor seq expert` over `devices`, by default all.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(config.over(len(devices)).sizes.values())
    if math.prod(shape) != len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in config.sizes.items())
        raise UsageError(
            f"mesh {asked} does not cover {len(devices)} devices: want sizes whose product is "
            f"{len(devices)}"
        )
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


@contextlib.contextmanager
def placed(config: MeshConfig) -> Iterator[Mesh]:
    """The mesh over all devices, in force together with its rules."""
    mesh = make_mesh(config)
    with config.ruled(), jax.set_mesh(mesh):
        yield mesh


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise UsageError unless all parts of the mesh get equally many examples.

    With `accumulate` that holds for each of so many parts of a batch.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (ways * accumulate):
        parts = f" times accumulate = {accumulate}" if accumulate > 1 else ""
        raise UsageError(
            f"batch_size is {batch_size}: want a multiple of {ways * accumulate}, the mesh's data "
            f"x fsdp x expert{parts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of every array of a batch is divided over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_share(sharding: NamedSharding, batch_size: int, process: int | None = None) -> Share:
    """Which rows of every batch a process reads, by default this one: those of its devices.

    Raises:
      UsageError: processes share examples in part.
    """
    places = sharding.devices_indices_map((batch_size,)).items()
    rows: list[set[int]] = [set() for _ in range(1 + max(d.process_index for d, _ in places))]
    for device, (part,) in places:
        rows[device.process_index].update(range(*part.indices(batch_size)))
    return share_of(jax.process_index() if process is None else process, rows)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """The rows [B / shares, ...] of this process to global arrays [B, ...] on the devices."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def barely_sharded(params: Any) -> str | None:
    """A warning if too little of the parameters is divided on a mesh with `fsdp`, else None.

    Args:
      params: arrays, or shapes with shardings.
    """
    sizes: dict[str, int] = {}
    divided = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        size = leaf.size * leaf.dtype.itemsize
        if leaf.sharding.mesh.shape["fsdp"] == 1:
            return None
        if leaf.sharding.is_fully_replicated:
            sizes[jax.tree_util.keystr(path, simple=True, separator="/")] = size
        else:
            divided += size
    whole = sum(sizes.values())
    if divided >= SHARDED_ENOUGH * (divided + whole):
        return None
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    return (
        f"mesh: only {divided / (divided + whole):.0%} of the parameters are divided among "
        f"devices; every device holds all of {', '.join(largest)}, ...: sizes of the mesh that "
        "divide the model's would need less memory"
    )
