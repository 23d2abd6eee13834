"""Devices to plan for: slices of TPU chips, which the TPU compiler describes, or CPU devices."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from zoo.models.core.errors import UsageError

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """What a chip can do at most.

    Attributes:
      flops: bfloat16 FLOPs per second.
      hbm: bytes of its memory that the compiler gives to a program.
      hbm_bandwidth: bytes per second between memory and cores.
      ici_bandwidth: bytes per second that it sends to its neighbours, over all links together.
      axes: dimensions of the torus that its slices are.
      options: how the compiler is asked for one device per chip.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    axes: int
    options: tuple[tuple[str, str], ...] = ()


# https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Their interconnect bandwidth is that of
# both directions (v5e 400 and v6e 800 GB/s) or, in bits, of one (v4 2400 and v5p 4800 Gbit/s).
# Of the published 32, 16, 95 and 32 GB of memory the compiler of libtpu 0.0.52 hands out these.
CHIPS = {
    "v4": Chip(275e12, int(30.75 * GIB), 1.2e12, 300e9, 3, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 200e9, 2),
    "v5p": Chip(459e12, int(95.73 * GIB), 2765e9, 600e9, 3),
    "v6e": Chip(918e12, int(31.24 * GIB), 1638e9, 400e9, 2),
}

_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened: plans may run beside one another
}
"""What the TPU library would otherwise ask the machine that it believes to run on."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: such as "v5p:8x8x8".
      devices: of the whole slice.
      chip: what each of them is; None for CPU devices.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None

    @property
    def hbm(self) -> int:
        """Bytes that each device has: of CPU devices, an equal share of this machine's memory."""
        if self.chip is not None:
            return self.chip.hbm
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return memory // len(self.devices)


def topology(name: str) -> Topology:
    """The devices of "v5e:16x16", "v5p:8x8x8" and the like, or of "cpu:8".

    Raises:
      UsageError: a name or a shape that does not exist, or the TPU compiler is not installed.
    """
    if found := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name, _cpu_devices(int(found[1])), None)
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UsageError(
            f"topology is {name!r}: want a kind of chip ({', '.join(CHIPS)}) and the shape of the "
            "slice, such as v5e:16x16 or v5p:8x8x8, or cpu and a number, such as cpu:8"
        )
    if shape.count("x") + 1 != chip.axes:
        raise UsageError(
            f"topology is {name!r}: slices of {kind} have {chip.axes} dimensions, such as "
            f"{kind}:{'x'.join(['4'] * chip.axes)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"planning for {name} needs the TPU compiler, which runs without a TPU: pip install "
            "'vlm-zoo[tpu]', or pip install libtpu. Without it, plan for CPU devices: --topology "
            "cpu:8"
        )
    from jax.experimental import topologies

    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **dict(chip.options)
        )
    except Exception as error:  # of several kinds, by what the library has found wrong
        raise UsageError(f"topology is {name!r}: {error}") from None
    return Topology(name, described.devices, chip)


def _cpu_devices(number: int) -> Sequence[jax.Device]:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # there are devices already, perhaps enough
            jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UsageError(
            f"topology is cpu:{number}: this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number} before it starts"
        )
    return devices[:number]
