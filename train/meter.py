"""How fast a run is and what it takes: step time, throughput, MFU, waiting, memory."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from zoo.costing import program_flops
from zoo.train.config import Experiment
from zoo.train.objectives import Variant
from zoo.train.plan.plan import traced_step, without_waste
from zoo.train.plan.topology import CHIPS
from zoo.train.setup import Setup

_GPUS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""bfloat16 FLOPs per second of dense products, from NVIDIA's data sheets."""

_TPUS = {"v6 lite": "v6e", "v6e": "v6e", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v4": "v4"}
"""How JAX calls the chips that planning knows; more telling names come first."""


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOPs per second of a device that JAX calls `kind`; None if it is not known."""
    peaks = _GPUS | {name: CHIPS[chip].flops for name, chip in _TPUS.items()}
    return next((peak for name, peak in peaks.items() if name in kind), None)


def step_flops(experiment: Experiment, mesh: Mesh, variant: Variant) -> int:
    """FLOPs of the products of a step, on all devices together, in which nothing counts twice."""
    _, traced = traced_step(without_waste(experiment), mesh, variant)
    return program_flops(traced.jaxpr)


class Meter:
    """What happened since it was last reset.

    Args:
      examples: in a step.
      tokens: in a step, or None if the model has no sequence.
      waited: seconds that the run has waited for data so far.
      flops: of a step of a variant, on all devices together, nothing counted twice; asked only
        where `peak` is known, and once for each variant.
      peak: FLOPs per second that all devices together can do at most; None if it is not known.
      devices: of this process.
    """

    def __init__(
        self,
        examples: int,
        tokens: int | None,
        waited: Callable[[], float],
        flops: Callable[[Variant], int],
        peak: float | None,
        devices: Sequence[jax.Device],
    ):
        self._examples = examples
        self._tokens = tokens
        self._waited = waited
        self._flops = flops
        self._peak = peak
        self._devices = devices
        self._known: dict[Variant, int] = {}
        self.reset()

    @classmethod
    def of(cls, setup: Setup, mesh: Mesh, waited: Callable[[], float]) -> "Meter":
        """That of a run on the devices of `mesh`."""
        experiment = setup.experiment
        peak = experiment.watch.peak_flops or peak_flops(mesh.devices.flat[0].device_kind)
        return cls(
            experiment.batch_size,
            setup.tokens,
            waited,
            lambda variant: step_flops(experiment, mesh, variant),
            None if peak is None else peak * mesh.size,
            mesh.local_devices,
        )

    def reset(self) -> None:
        """Begin anew: what took time before is not part of a step."""
        self._variants: Counter[Variant] = Counter()
        self._began, self._waited_before = time.monotonic(), self._waited()

    def step(self, variant: Variant) -> None:
        """A step was made."""
        self._variants[variant] += 1

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reset, and the most memory of the whole run.

        `step_seconds` and `steps_per_second`; `examples_per_second`; `tokens_per_second`, places of
        sequences whether or not something stands there; `data_wait`, the share of the time that
        went by waiting for data; `mfu`, the share that the model's products are of what the devices
        can do; `peak_memory_bytes` of the fullest device; `peak_host_bytes` of this process. What
        is not known is not there.
        """
        seconds = time.monotonic() - self._began
        steps = self._variants.total()
        found = {
            "steps_per_second": steps / seconds,
            "examples_per_second": steps * self._examples / seconds,
            "data_wait": (self._waited() - self._waited_before) / seconds,
            "peak_host_bytes": float(_peak_host_bytes()),
        }
        if steps:
            found["step_seconds"] = seconds / steps
        if self._tokens is not None:
            found["tokens_per_second"] = steps * self._tokens / seconds
        if (memory := peak_memory_bytes(self._devices)) is not None:
            found["peak_memory_bytes"] = float(memory)
        if self._peak is not None and steps:
            found["mfu"] = self._work() / seconds / self._peak
        return found

    def _work(self) -> int:
        """FLOPs of the steps since the last reset."""
        for variant in self._variants.keys() - self._known.keys():
            self._known[variant] = self._flops(variant)
        return sum(self._known[variant] * times for variant, times in self._variants.items())


def peak_memory_bytes(devices: Sequence[jax.Device]) -> int | None:
    """The most memory that one of the devices has had in use; None where they do not tell."""
    stats = [device.memory_stats() or {} for device in devices]
    found = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(found, default=None)


def _peak_host_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
