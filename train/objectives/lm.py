"""Next-token prediction, with elastic numbers of vision tokens where the model has them."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.models.core.errors import UsageError
from zoo.models.core.types import IGNORE, Batch
from zoo.train.objectives.base import Mean, Objective, Variant

_DRAWN = "drawn"
"""The variant of a step that draws its budget from its key, which is the same on every host."""


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean cross-entropy of the labelled tokens of the whole batch.

    Attributes:
      budgets: numbers of vision tokens per image; each step draws one of them, uniformly, for the
        whole batch. Empty: every step uses all. Follows: arXiv:2405.19315, which draws from 2, 4,
        ..., M.
      masked: the budget is data of one program, which computes all vision tokens and masks the
        surplus, instead of a program per budget. Equal numbers; less to compile, more to compute.
    """

    budgets: tuple[int, ...] = ()
    masked: bool = False

    def __post_init__(self) -> None:
        if any(budget < 1 for budget in self.budgets):
            raise UsageError(f"objective.budgets is {self.budgets}: want numbers of 1 or more")

    def variant(self, seed: int, step: int) -> Variant:
        """The budget of step `step`, `_DRAWN` if it draws its own, or None for all tokens."""
        if not self.budgets:
            return None
        if self.masked:
            return _DRAWN
        return self.budgets[np.random.default_rng((seed, step)).integers(len(self.budgets))]

    def loss(
        self, model: nn.Module, params: Any, batch: Batch, key: jax.Array, variant: Variant
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Cross-entropy in nats, and `accuracy`: how often the label is the likeliest token."""
        budget: dict[str, Any] = {} if variant is None else {"budget": variant}
        if variant == _DRAWN:
            budget["budget"] = jax.random.choice(key, jnp.asarray(self.budgets))
        out = model.apply({"params": params}, batch, **budget)
        logits = model.apply({"params": params}, out.hidden, method="head")  # [B, L, V]
        label = out.tokens.tags["label"]  # [B, L], that of the next token
        learned = label != IGNORE
        safe = jnp.where(learned, label, 0)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
        weight = learned.sum(dtype=jnp.float32)
        loss = Mean(jnp.where(learned, each, 0).sum(), weight)
        right = learned & (logits.argmax(-1) == label)
        return loss.value, {
            "loss": loss,
            "accuracy": Mean(right.sum(dtype=jnp.float32), weight),
        }
