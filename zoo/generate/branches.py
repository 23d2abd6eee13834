"""One answer from several readings of its prompt: with the picture and without it, say.

The readings are rows of one batch with one cache, so that a step reads the weights once for all of
them, and every token that is chosen goes to each. What they see is for `Branches` to say, and what
becomes of their logits for `Combine`: classifier-free guidance and contrastive decoding differ in
nothing else.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax.numpy as jnp

from zoo.generate.autoregressive import Reader
from zoo.models.core.types import Array, Batch


class Branches(Protocol):
    """What the readings see; hashable."""

    def __call__(
        self, reader: Reader, params: Any, prompts: Batch, budget: Array | None
    ) -> tuple[Batch, ...]:
        """The prompts [B, ...] as each reading sees them: batches of the same names and shapes, the
        plain one first.
        """
        ...


class Combine(Protocol):
    """What becomes of the logits; hashable."""

    def __call__(self, logits: Array) -> Array:
        """Float32 logits [n, B, V] of n readings to those [B, V] that a token is chosen by."""
        ...


@dataclass(frozen=True)
class Combined(Reader):
    """Reads the prompts in several ways and decodes from all at once.

    Attributes:
      branches: what the readings see.
      combine: what becomes of their logits.
    """

    branches: Branches = field(kw_only=True)
    combine: Combine = field(kw_only=True)

    def prefill(
        self, params: Any, prompts: Batch, budget: Array | None, room: int
    ) -> tuple[Array, Any]:
        """As that of `Reader`; the cache is of all readings."""
        rows = len(prompts["ids"])
        seen = self.branches(self, params, prompts, budget)
        joined = {name: jnp.concatenate([each[name] for each in seen]) for name in seen[0]}
        if budget is not None and budget.ndim:
            budget = jnp.tile(budget, len(seen))
        logits, cache = super().prefill(params, joined, budget, room)
        return self.combine(logits.reshape(-1, rows, logits.shape[-1])), cache

    def decode(self, params: Any, ids: Array, cache: Any) -> tuple[Array, Any]:
        """As that of `Reader`."""
        rows = len(ids)
        ids = jnp.tile(ids, (len(cache.next_position) // rows, 1))
        logits, cache = super().decode(params, ids, cache)
        return self.combine(logits.reshape(-1, rows, logits.shape[-1])), cache


@dataclass(frozen=True)
class Contrast:
    """`(1 + alpha) l - alpha l'` for the tokens that the first reading finds likely, -inf for all
    others. Follows: arXiv:2311.16922, equations 3 and 4.

    Attributes:
      alpha: how much the second reading counts against a token; 0 for not at all.
      beta: a token is likely if its probability is at least so much of the greatest; 0 to 1.

    Raises:
      ValueError: one of them is out of its range.
    """

    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.beta <= 1):
            raise ValueError(
                f"alpha = {self.alpha}, beta = {self.beta}: want alpha from 0 on and beta between "
                "0 and 1"
            )

    def __call__(self, logits: Array) -> Array:
        """Logits [2, B, V] to [B, V]."""
        plain, other = logits
        found = (1 + self.alpha) * plain - self.alpha * other
        if not self.beta:
            return found
        least = plain.max(-1, keepdims=True) + math.log(self.beta)
        return jnp.where(plain >= least, found, -jnp.inf)


@dataclass(frozen=True)
class Guidance:
    """`l' + scale (l - l')`, classifier-free guidance. Follows: arXiv:2306.17806, equation 7.

    Attributes:
      scale: 1 for the first reading alone, more for what tells it from the second one.
    """

    scale: float = 3.0

    def __call__(self, logits: Array) -> Array:
        """Logits [2, B, V] to [B, V]."""
        plain, other = logits
        return other + self.scale * (plain - other)
