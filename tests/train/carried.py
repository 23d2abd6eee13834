"""A model that keeps running statistics and an objective that carries a queue and a teacher."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tests.train.tiny import TinyConfig, TinyModel, tiny
from zoo.train.config import Experiment
from zoo.train.objectives import Mean, NextToken, Objective


class Normed(TinyModel):
    """The tiny model, whose result is divided by the deviation of each of its columns: that of the
    batch in training, else a running one.
    """

    def setup(self) -> None:
        super().setup()
        self.variance = self.variable("stats", "norm", lambda: {"variance": jnp.ones(self.width)})

    def __call__(self, batch: Any, *, budget: int | None = None, train: bool = False) -> Any:
        out = super().__call__(batch, budget=budget)
        variance = self.variance.value["variance"]
        if train:
            found = out.hidden.var((0, 1))
            self.variance.value = {"variance": 0.9 * variance + 0.1 * found}
            variance = found
        return out.__class__(out.hidden / jnp.sqrt(variance + 1e-5), out.tokens)


@dataclass(frozen=True)
class NormedConfig(TinyConfig):
    def build(self) -> Normed:
        return Normed(self.width)


@dataclass(frozen=True)
class Remembering(Objective):
    """Next tokens, near a teacher (the first parameters) and a queue of the losses of late."""

    fixed: ClassVar[tuple[str, ...]] = ("teacher",)
    inner: NextToken = field(default_factory=NextToken)
    length: int = 3

    def init(self, model: Any, variables: Any, inputs: Any) -> dict[str, Any]:
        queue = jnp.zeros(self.length)
        return {"queue": queue, "teacher": {"up": variables["params"]["up"]}}

    def loss(
        self, model: Any, variables: Any, aux: Any, batch: Any, key: Any, variant: Any, *,
        train: bool = True,
    ) -> Any:  # fmt: skip
        terms, others, carried = self.inner.loss(
            model, variables, {}, batch, key, variant, train=train
        )
        up, teacher = variables["params"]["up"]["kernel"], aux["teacher"]["up"]["kernel"]
        weight = jax.lax.stop_gradient(terms["loss"].weight)
        near = Mean(weight * ((up - teacher) ** 2).sum(), weight)
        late = Mean(aux["queue"].mean() * weight, weight)
        newest = jax.lax.stop_gradient(terms["loss"].value)
        queue = jnp.concatenate([aux["queue"][1:], newest[None]])
        return (
            {**terms, "near": near},
            {**others, "late": late},
            carried | {"aux": {"queue": queue}},
        )


def carrying(**changes: Any) -> Experiment:
    """The tiny experiment with both."""
    return tiny(model=NormedConfig(), **{"objective": Remembering(), **changes})
