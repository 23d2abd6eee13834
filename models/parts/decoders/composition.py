"""Decoder policies put together: what a configuration of one is, and which of them go together."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from zoo.models.core.registry import check_part
from zoo.models.parts.decoders.gqa import Plan


@runtime_checkable
class PolicyConfig(Protocol):
    """Configuration of a decoder policy: it turns the plan of a decoder into another."""

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with this policy, for at most `slots` vision tokens in the sequence."""
        ...


def compose(plan: Plan, policies: Sequence[Any], *, slots: int) -> Plan:
    """The plan of a decoder with all of its policies.

    Args:
      plan: of the plain decoder.
      policies: configurations (`PolicyConfig`), applied in this order: the first is innermost.
      slots: vision tokens in the sequence at most; 0 for text alone.

    Raises:
      ValueError: what is no configuration of a policy, one that the plan cannot have, or policies
        that do not go together; it says why.
    """
    for number, policy in enumerate(policies):
        check_part(f"policies[{number}]", policy, PolicyConfig)
        if any(type(policy) is type(other) for other in policies[:number]):
            raise ValueError(f"policies: {type(policy).__name__} is there twice; give it once")
        plan = policy.apply(plan, slots=slots)
    _check_drops(plan)
    return plan


def _check_drops(plan: Plan) -> None:
    """Raise ValueError if a policy that is meant for all tokens comes where some are gone."""
    dropped: tuple[str, int] | None = None
    for layer, step in enumerate(plan):
        for policy in step.policies:
            if policy.drops and dropped is None:
                dropped = (policy.name, layer)
        for policy in step.policies:
            if policy.needs_all and dropped is not None:
                name, first = dropped
                raise ValueError(
                    f"policies: {policy.name} at layer {layer} is meant for all tokens, and {name} "
                    f"drops some for good at layer {first}; let it drop in a layer after {layer}"
                )
