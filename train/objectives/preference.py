"""Of two answers to a prompt, the one that is preferred."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.models.parts.layers.operands import has_operands, unmerge
from zoo.train.data.preferences import REJECTED
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
)
from zoo.train.objectives.lm import head_of, reported, sequence_logps

Kind = Literal["sigmoid", "hinge", "ipo"]


class Scores(NamedTuple):
    """Log-probabilities of the answers to B prompts, summed over their tokens, and how many these
    are; float32 [B] each.
    """

    chosen: Array
    rejected: Array
    chosen_length: Array
    rejected_length: Array


@dataclass(frozen=True)
class Preference(Objective):
    """The preferred answer becomes likelier than the other, compared with a frozen reference.

    The reference is the model as training found it. With low-rank adapters it is the model without
    them, which takes no further memory; what else trains beside adapters changes it too. Follows:
    arXiv:2305.18290, equation 7.

    Attributes:
      beta: how closely the model stays to its reference.
      kind: what margin by what cost: "sigmoid", -log sigmoid(beta margin), the loss of the paper;
        "hinge", max(0, 1 - beta margin); "ipo", (margin - 1 / (2 beta))^2, with log-probabilities
        that are means over the tokens, arXiv:2310.12036.
      label_smoothing: chance that a label is wrong, for "sigmoid": so much of the opposite cost.
      likelihood: weight of the chosen answer's own negative log-probability, a sum over its tokens.
      chunk: as in `NextToken`.
    """

    beta: float = 0.1
    kind: Kind = "sigmoid"
    label_smoothing: float = 0.0
    likelihood: float = 0.0
    chunk: int | None = None

    fixed: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UsageError(f"objective.beta is {self.beta}: want more than 0")
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise UsageError(f"objective.kind is {self.kind!r}: want one of {known}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UsageError(
                f"objective.label_smoothing is {self.label_smoothing}: want from 0 to below 0.5"
            )
        if self.label_smoothing and self.kind != "sigmoid":
            raise UsageError(f"objective.label_smoothing is for 'sigmoid', not {self.kind!r}")
        if self.likelihood < 0:
            raise UsageError(f"objective.likelihood is {self.likelihood}: want 0 or more")
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"objective.chunk is {self.chunk}: want 1 or more tokens, or None")

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """The reference; nothing where the model has adapters, without which it is its own."""
        if has_operands(variables["params"]):
            return {}
        return {"reference": variables["params"]}

    def loss(
        self,
        model: nn.Module,
        variables: Variables,
        aux: Mapping[str, Any],
        batch: Batch,
        key: Array,
        variant: Variant,
        *,
        train: bool = True,
    ) -> tuple[Means, Means, Carried]:
        """The loss; how often the preferred answer has the greater reward, the rewards of both, and
        the log-probability of the preferred one.

        Raises:
          UsageError: the batch has no pairs of answers.
        """
        if f"{REJECTED}ids" not in batch:
            raise UsageError(
                "the data has no rejected answers: Preference wants records with a prompt, a "
                "chosen and a rejected answer, such as PreferenceJson gives"
            )
        both = paired(batch)
        out, carried = applied(model, variables, both, train=train, key=key)
        policy = self._scores(model, variables, out)
        known = aux["reference"] if "reference" in aux else unmerge(variables["params"])
        frozen = {**variables, "params": jax.lax.stop_gradient(known)}
        shown, _ = applied(model, frozen, both, train=False, key=key)
        reference = self._scores(model, frozen, shown)
        costs = preference_costs(
            policy, reference, self.beta, self.kind, label_smoothing=self.label_smoothing
        )
        costs = costs - self.likelihood * policy.chosen
        rewards = [
            jax.lax.stop_gradient(self.beta * (ours - theirs))
            for ours, theirs in zip(policy[:2], reference[:2], strict=True)
        ]
        weight = jnp.float32(costs.shape[0])
        facts = {
            "preferred": (rewards[0] > rewards[1]).astype(jnp.float32),
            "chosen_reward": rewards[0],
            "rejected_reward": rewards[1],
            "chosen_logp": policy.chosen,
        }
        metrics = {name: Mean(fact.sum(), weight) for name, fact in facts.items()}
        return {"loss": Mean(costs.sum(), weight), **reported(out)}, metrics, carried

    def _scores(self, model: nn.Module, variables: Variables, out: Any) -> Scores:
        label = out.tokens.tags["label"]
        found = sequence_logps(head_of(model), variables, out.hidden, label, self.chunk)
        (chosen, rejected), lengths = (x.reshape(-1, 2).T for x in found)
        return Scores(chosen, rejected, *lengths)


def paired(batch: Batch) -> dict[str, Array]:
    """Rows [2 B, ...] from pairs [B, ...]: each preferred answer, then the other one."""
    out = {}
    for name, x in batch.items():
        if not name.startswith(REJECTED):
            both = jnp.stack([x, batch.get(REJECTED + name, x)], 1)
            out[name] = both.reshape(-1, *x.shape[1:])
    return out


def preference_costs(
    policy: Scores, reference: Scores, beta: float, kind: Kind, *, label_smoothing: float = 0.0
) -> Array:
    """What each pair costs, float32 [B]; see `Preference`."""
    if kind == "ipo":
        policy, reference = _means(policy), _means(reference)
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    match kind:
        case "sigmoid":
            right, wrong = (-jax.nn.log_sigmoid(sign * beta * margin) for sign in (1, -1))
            return (1 - label_smoothing) * right + label_smoothing * wrong
        case "hinge":
            return jax.nn.relu(1 - beta * margin)
        case "ipo":
            return (margin - 1 / (2 * beta)) ** 2


def _means(scores: Scores) -> Scores:
    """The scores as means over the tokens."""
    chosen = scores.chosen / jnp.maximum(scores.chosen_length, 1)
    rejected = scores.rejected / jnp.maximum(scores.rejected_length, 1)
    return scores._replace(chosen=chosen, rejected=rejected)
