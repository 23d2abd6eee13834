"""What to change in an experiment whose step does not fit."""

import math
from collections.abc import Callable
from dataclasses import replace

from zoo.models.core.codec import diff, encode
from zoo.models.core.config import with_field
from zoo.models.core.errors import UsageError
from zoo.train.config import Experiment
from zoo.train.mesh import MeshConfig
from zoo.train.plan.plan import Plan, plan
from zoo.train.plan.topology import Topology

_TENSOR = (2, 4, 8)
"""Ways to divide every layer; more than that seldom pays."""


def suggest(
    experiment: Experiment, where: Topology, say: Callable[[str], None]
) -> tuple[Experiment, Plan] | None:
    """The first experiment that fits, of those that `candidates` yields, and its plan.

    Args:
      experiment: what does not fit.
      where: the devices.
      say: is told in a line what is tried.

    Returns:
      None if none of them fits.
    """
    for candidate in candidates(experiment, len(where.devices)):
        say(f"does not fit; trying {flags(experiment, candidate)}")
        try:
            found = plan(candidate, where)
        except UsageError as error:  # sizes that do not divide
            say(f"  {error}")
            continue
        if found.fits:
            return candidate, found
    return None


def candidates(experiment: Experiment, devices: int) -> list[Experiment]:
    """What is worth trying, each with the changes of those before it: parameters and examples over
    all devices, layers computed twice, a batch in parts, layers divided.
    """
    batch = experiment.batch_size
    # A device needs an example at least; where there are too few, some share the layers.
    ways = math.gcd(batch, devices)
    spread = replace(experiment, mesh=MeshConfig(data=1, fsdp=ways, tensor=devices // ways))
    found = [experiment, spread]
    found.append(replace(spread, model=with_field(spread.model, "remat", "full")))
    found.append(replace(found[-1], accumulate=batch // ways))
    for tensor in _TENSOR:
        if devices % tensor == 0:
            ways = math.gcd(batch, devices // tensor)
            mesh = MeshConfig(data=1, fsdp=ways, tensor=devices // ways)
            found.append(replace(found[-1], mesh=mesh, accumulate=batch // ways))
    sized = {repr(replace(each, mesh=each.mesh.over(devices))): each for each in found}
    return list(sized.values())[1:]  # the first is what there is


def flags(old: Experiment, new: Experiment) -> str:
    """The flags of the command line that turn one experiment into another."""
    changes = diff(encode(old), encode(new))
    return " ".join(f"--{path.replace('_', '-')} {after}" for path, (_, after) in changes.items())
