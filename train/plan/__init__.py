"""What a step of training will need on devices that are not there: `zoo plan`."""

from zoo.train.plan.plan import Plan, plan
from zoo.train.plan.topology import CHIPS, Chip, Topology, topology

__all__ = ["CHIPS", "Chip", "Plan", "Topology", "plan", "topology"]
