"""Planning: the step that the loop would run is compiled for devices that need not be there."""

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from zoo.costing import program_flops
from zoo.models.core.config import with_field
from zoo.train.config import Experiment
from zoo.train.mesh import batch_sharding, check_batch_size, make_mesh
from zoo.train.objectives import Variant
from zoo.train.plan.collectives import Traffic, by_kind, traffic
from zoo.train.plan.topology import Chip, Topology, topology
from zoo.train.setup import Setup


@dataclass(frozen=True)
class Plan:
    """What a step of training needs.

    Attributes:
      fits: whether every device has the memory.
      hbm_bytes: per device: `params` (also frozen and averaged ones), `optimizer`, `temporaries`
        (activations, gradients, batch and program), their `total`, and the `limit`.
      flops: of products, in a step, on all devices together; what is computed twice to save memory
        counts twice.
      collectives: kind -> bytes that every device sends in a step; empty if the compiler gave up
        for want of memory.
      step_seconds_bound: no step is faster: the greatest of `bounds`; None for CPU devices.
      mfu_bound: the share of the chips' peak FLOPs that such a step would use for the model, in
        which nothing counts twice; None for CPU devices.
      mesh: devices along each axis.
      topology: the devices.
      batch_size: examples per step.
      bounds: seconds of a step by what they are for: `compute`, `memory` (the state is read and
        written once) and `network`; empty for CPU devices.
      traffic: `collectives` by axes of the mesh too.
    """

    fits: bool
    hbm_bytes: Mapping[str, int]
    flops: int
    collectives: Mapping[str, int]
    step_seconds_bound: float | None
    mfu_bound: float | None
    mesh: Mapping[str, int]
    topology: str
    batch_size: int
    bounds: Mapping[str, float]
    traffic: Traffic

    def as_json(self) -> dict[str, Any]:
        """The facts that other programs may rely on."""
        names = ("fits", "hbm_bytes", "flops", "collectives", "step_seconds_bound", "mfu_bound")
        return {name: getattr(self, name) for name in (*names, "mesh")}


def plan(experiment: Experiment, where: str | Topology) -> Plan:
    """Compile the step of an experiment and tell what it needs.

    The step is that of the model at its fullest, where steps differ. Nothing runs, and no weight is
    made; what takes its time is the compiler.

    Args:
      experiment: what is trained; its mesh has to cover the devices.
      where: the devices, by name as in `topology`.

    Raises:
      UsageError: an unknown topology, a mesh that does not cover it, or a batch that does not
        divide evenly.
    """
    where = topology(where) if isinstance(where, str) else where
    mesh = make_mesh(experiment.mesh, where.devices)
    check_batch_size(experiment.batch_size, mesh, experiment.accumulate)
    state, traced = traced_step(experiment, mesh)
    flops = program_flops(traced.jaxpr)
    lean = without_waste(experiment)
    useful = flops if lean == experiment else program_flops(traced_step(lean, mesh)[1].jaxpr)

    kept = {
        "params": _bytes_per_device(
            (state.params, state.frozen, state.average, state.stats, state.aux, state.fixed)
        ),
        "optimizer": _bytes_per_device(state.opt_state),
    }
    sizes = dict(mesh.shape)
    try:
        compiled, text = _compiled(traced.lower(), where.devices[0].platform)
    except jax.errors.JaxRuntimeError as error:
        total, moved, sent, fits = needed(error), 2 * sum(kept.values()), {}, False
    else:
        memory = compiled.memory_analysis()
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        total = moved - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        total += memory.generated_code_size_in_bytes
        sent = traffic(text, sizes)
        fits = total <= where.hbm
    rest = total - sum(kept.values())
    hbm_bytes = {**kept, "temporaries": rest, "total": total, "limit": where.hbm}
    bounds = _bounds(where.chip, flops / mesh.size, moved, sum(sent.values()))
    seconds = max(bounds.values(), default=None)
    return Plan(
        fits=fits,
        hbm_bytes=hbm_bytes,
        flops=flops,
        collectives=by_kind(sent),
        step_seconds_bound=seconds,
        mfu_bound=where.chip and useful / (mesh.size * where.chip.flops * seconds),
        mesh=sizes,
        topology=where.name,
        batch_size=experiment.batch_size,
        bounds=bounds,
        traffic=sent,
    )


def traced_step(experiment: Experiment, mesh: Mesh, variant: Variant = None) -> tuple[Any, Any]:
    """The shapes of the state, and the traced step, as `zoo.train.loop.train` makes them."""
    with experiment.mesh.ruled():
        return _traced_step(experiment, mesh, variant)


def _traced_step(experiment: Experiment, mesh: Mesh, variant: Variant) -> tuple[Any, Any]:
    setup = Setup.of(experiment)
    state = setup.state(mesh)
    step = setup.train_step(state)
    sharding = batch_sharding(mesh)
    inputs = experiment.model.inputs(experiment.batch_size)
    targets = experiment.objective.targets(setup.model, inputs)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in {**inputs, **targets}.items()
    }
    # Not `set_mesh`, with which JAX would also compute on these devices.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return state, step.trace(state, batch, variant)


def _compiled(lowered: Any, platform: str) -> tuple[Any, str]:
    """The program and its text."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # From the compiler itself: `as_text` fails where a program has what this jaxlib does not know.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (file,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, file.read_text(encoding="utf-8")


def without_waste(experiment: Experiment) -> Experiment:
    """The same step with all the memory in the world, which computes nothing twice."""
    objective = experiment.objective
    if getattr(objective, "chunk", 0) != 0:
        objective = replace(objective, chunk=1 << 30)
    model = with_field(experiment.model, "remat", "none")
    return replace(experiment, accumulate=1, objective=objective, model=model)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_AMOUNT = r"([\d.]+)([KMGT]?)"
_SHORTAGE = re.compile(
    rf"\({_AMOUNT}\) exceeds available HBM|Used {_AMOUNT} of {_AMOUNT} hbm", re.IGNORECASE
)


def needed(error: Exception) -> int:
    """The bytes that the compiler could not find room for.

    Raises:
      the error itself, if it is about something else.
    """
    found = _SHORTAGE.search(str(error))
    if found is None:
        raise error
    amount, unit = [group for group in found.groups() if group is not None][:2]
    return int(float(amount) * _UNITS[unit])


def _bounds(chip: Chip | None, flops: float, moved: int, sent: int) -> dict[str, float]:
    if chip is None:
        return {}
    return {
        "compute": flops / chip.flops,
        "memory": moved / chip.hbm_bandwidth,
        "network": sent / chip.ici_bandwidth,
    }
