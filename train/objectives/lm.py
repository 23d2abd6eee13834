"""Next-token prediction, with elastic numbers of vision tokens where the model has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from zoo.models.core.errors import UsageError
from zoo.models.core.types import IGNORE, Array, Batch, Output
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
)
from zoo.train.objectives.chunks import Head, chunk_of, in_chunks

_DRAWN = "drawn"
"""The variant of a step that draws its budget from its key, which is the same on every host."""


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean cross-entropy of the labelled tokens of the whole batch.

    What policies of the model report under a name that ends with `_loss` (a scalar, already
    weighted, the mean of a batch) is added, summed over the layers.

    Attributes:
      budgets: numbers of vision tokens per image; each step draws one of them, uniformly, for the
        whole batch. Empty: every step uses all. Follows: arXiv:2405.19315, which draws from 2, 4,
        ..., M.
      masked: the budget is data of one program, which computes all vision tokens and masks the
        surplus, instead of a program per budget. Equal numbers; less to compile, more to compute.
      z_loss: weight of the mean squared logarithm of the softmax's normaliser, which keeps logits
        from drifting; 0 for none. Follows: arXiv:2204.02311, section 5.
      chunk: tokens of a row whose logits are in memory at once; their gradient computes them anew.
        None: all of them, or as few as keep within `WHOLE_LOGITS` an example. The numbers are the
        same up to the order of sums.
    """

    budgets: tuple[int, ...] = ()
    masked: bool = False
    z_loss: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if any(budget < 1 for budget in self.budgets):
            raise UsageError(f"objective.budgets is {self.budgets}: want numbers of 1 or more")
        if self.z_loss < 0:
            raise UsageError(f"objective.z_loss is {self.z_loss}: want 0 or more")
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"objective.chunk is {self.chunk}: want 1 or more tokens, or None")

    def variant(self, seed: int, step: int) -> Variant:
        """The budget of step `step`, `_DRAWN` if it draws its own, or None for all tokens."""
        if not self.budgets:
            return None
        if self.masked:
            return _DRAWN
        return self.budgets[np.random.default_rng((seed, step)).integers(len(self.budgets))]

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
        """Cross-entropy in nats, and `accuracy`: how often the label is the likeliest token."""
        budget: dict[str, Any] = {} if variant is None else {"budget": variant}
        if variant == _DRAWN:
            budget["budget"] = jax.random.choice(key, jnp.asarray(self.budgets))
        out, carried = applied(model, variables, batch, train=train, key=key, **budget)

        label = out.tokens.tags["label"]  # [B, L], that of the next token
        sums = _sums(head_of(model), variables, out.hidden, label, self.chunk)
        weight = (label != IGNORE).sum(dtype=jnp.float32)
        terms = {"loss": Mean(sums.cross_entropy, weight)}
        if self.z_loss:
            terms["z_loss"] = Mean(self.z_loss * sums.squared_normaliser, weight)
        terms |= reported(out)
        return terms, {"accuracy": Mean(sums.right, weight)}, carried


@struct.dataclass
class _Sums:
    """Sums over the labelled tokens of a batch, float32 []."""

    cross_entropy: Array
    squared_normaliser: Array
    right: Array


def head_of(model: nn.Module) -> Head:
    """The map from variables and hidden states to the logits of a model."""
    return lambda variables, hidden: model.apply(variables, hidden, method="head")


def _sums(head: Head, variables: Any, hidden: Array, label: Array, chunk: int | None) -> _Sums:
    """What the logits of hidden states [B, L, D] and their labels [B, L] come to."""

    def of(variables: Any, hidden: Array, label: Array) -> _Sums:
        logits = head(variables, hidden)  # [B, L, V]
        learned = label != IGNORE
        safe = jnp.where(learned, label, 0)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
        normaliser = jax.nn.logsumexp(logits, -1)
        right = learned & (logits.argmax(-1) == label)
        return _Sums(
            jnp.where(learned, each, 0).sum(),
            jnp.where(learned, normaliser**2, 0).sum(),
            right.sum(dtype=jnp.float32),
        )

    chunk = chunk_of(head, variables, hidden, chunk)
    return in_chunks(of, variables, (hidden, label), (0, IGNORE), chunk)


def sequence_logps(
    head: Head, variables: Any, hidden: Array, label: Array, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probabilities of the labels of each row, summed, and how many there are.

    Args:
      head: variables and hidden states to logits.
      variables: what it reads.
      hidden: [B, L, D].
      label: [B, L], `IGNORE` where there is none.
      chunk: as in `NextToken`.

    Returns:
      float32 [B] each.
    """

    def of(variables: Any, hidden: Array, label: Array) -> tuple[Array, Array]:
        learned = label != IGNORE
        safe = jnp.where(learned, label, 0)
        logits = head(variables, hidden)
        each = -optax.softmax_cross_entropy_with_integer_labels(logits, safe)
        return jnp.where(learned, each, 0).sum(1), learned.sum(1, dtype=jnp.float32)

    chunk = chunk_of(head, variables, hidden, chunk)
    return in_chunks(of, variables, (hidden, label), (0, IGNORE), chunk)


def reported(out: Output) -> dict[str, Mean]:
    """The losses that the layers report, summed over them, as terms of the loss."""
    found: dict[str, Array] = {}
    for aux in out.aux:
        for name, value in aux.items():
            if name.endswith("_loss"):
                found[name] = found.get(name, 0) + value.astype(jnp.float32)
    rows = jnp.float32(out.hidden.shape[0])
    return {name: Mean(value * rows, rows) for name, value in found.items()}
