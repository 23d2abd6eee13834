"""The mesh of devices, and how batches lie on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zoo.models.core.errors import UsageError
from zoo.models.core.names import MESH_AXES


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; -1, for one axis, takes all that remain.

    Attributes:
      data: copies of the model, each with its own part of the batch.
      fsdp: parts of the batch among which the parameters are divided too.
      tensor: parts of every layer.
      seq: parts of the sequence.
      expert: parts of the experts.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    seq: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UsageError(
                f"mesh is {sizes}: want sizes of 1 or more, and -1 for one axis at most"
            )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with the axes `data fsdp tensor seq expert` over `devices`, by default all.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = astuple(config)
    fixed = math.prod(size for size in sizes if size != -1)
    rest, left_over = divmod(len(devices), fixed)
    shape = tuple(rest if size == -1 else size for size in sizes)
    if left_over or math.prod(shape) != len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise UsageError(
            f"mesh {asked} does not cover {len(devices)} devices: want sizes whose product is "
            f"{len(devices)}"
        )
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise UsageError unless all parts of the mesh get equally many examples.

    With `accumulate` that holds for each of so many parts of a batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * accumulate):
        parts = f" times accumulate = {accumulate}" if accumulate > 1 else ""
        raise UsageError(
            f"batch_size is {batch_size}: want a multiple of {ways * accumulate}, the mesh's data "
            f"x fsdp{parts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of every array of a batch is divided over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """Arrays [B / processes, ...] of this process to global arrays [B, ...] on the devices."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
