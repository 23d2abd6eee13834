"""Decoder policies put together: what a configuration of one is, and which of them go together."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from zoo.models.core.registry import check_part
from zoo.models.parts.decoders.gqa import Plan


@runtime_checkable
class PolicyConfig(Protocol):
    """Configuration of a decoder policy: it turns the plan of a decoder into another."""

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with this policy, for at most `slots` vision tokens in the sequence."""
        ...


def compose(
    plan: Plan, policies: Sequence[Any], *, slots: int, memory: Collection[str] = ()
) -> Plan:
    """The plan of a decoder with all of its policies.

    Args:
      plan: of the plain decoder.
      policies: configurations (`PolicyConfig`), applied in this order: the first is innermost.
      slots: vision tokens in the sequence at most; 0 for a model of text alone, where policies for
        vision tokens do nothing.
      memory: names of what the model gives its policies to read.

    Raises:
      ValueError: what is no configuration of a policy, one that this model has no place for, or
        policies that do not go together; it says why.
    """
    for number, policy in enumerate(policies):
        check_part(f"policies[{number}]", policy, PolicyConfig)
        if any(type(policy) is type(other) for other in policies[:number]):
            raise ValueError(f"policies: {type(policy).__name__} is there twice; give it once")
        plan = policy.apply(plan, slots=slots)
    if slots:
        _check_reads(plan, memory)
    return plan


def _check_reads(plan: Plan, memory: Collection[str]) -> None:
    """Raise ValueError if a policy reads what there is not, or where tokens are gone."""
    dropping: tuple[str, int] | None = None
    for layer, step in enumerate(plan):
        for policy in step.policies:
            if policy.drops and dropping is None:
                dropping = (policy.name, layer)
        for policy in step.policies:
            if missing := set(policy.reads) - set(memory):
                raise ValueError(
                    f"policies: {policy.name} at layer {layer} reads {', '.join(sorted(missing))}, "
                    "which this model does not make"
                )
            if policy.reads and dropping is not None:
                raise ValueError(
                    f"policies: {policy.name} at layer {layer} reads something for every vision "
                    f"token, but {dropping[0]} drops some for good at layer {dropping[1]}; let it "
                    f"drop them after layer {layer}"
                )
