"""A help that fades: its share by steps, what a model is told of it, iLLaMA's recipe."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.configs.illama_digits import config
from zoo.models.core.errors import UsageError
from zoo.models.vision.illama import SOFT_MASK
from zoo.train.objectives import Mean, Objective
from zoo.train.objectives.fading import Fading, share_left


def test_the_share():
    steps = np.arange(9)
    constant = np.array([share_left(step, 4) for step in steps])
    np.testing.assert_array_equal(constant, [1, 1, 1, 1, 0, 0, 0, 0, 0])
    linear = np.array(jax.vmap(lambda step: share_left(step, 4, "linear"))(steps))
    want = np.concatenate([np.linspace(1, 0, 4), np.zeros(5)])
    np.testing.assert_allclose(linear, want, atol=1e-6)
    assert share_left(0, 1, "linear") == 1


@dataclass(frozen=True)
class Told(Objective):
    """Its loss is what the batch says of the help, and 7 where it says nothing."""

    def loss(self, model, variables, aux, batch, key, variant, *, train=True):
        term = Mean(jnp.float32(batch.get("help", 7.0)), jnp.float32(1))
        return {"loss": term}, {}, {"aux": {"own": aux["own"] + 1}}

    def init(self, model, variables, inputs):
        return {"own": jnp.int32(0)}


def test_steps_are_counted():
    """Every step is told less; what the other objective carries is carried; evaluation is plain."""
    objective = Fading("help", 3, "linear", Told())
    aux, told = objective.init(None, {}, {}), []
    for _ in range(5):
        terms, _, carried = objective.loss(None, {}, aux, {}, jax.random.key(0), None)
        told.append(float(terms["loss"].value))
        aux = carried["aux"]
    assert told == [1, 0.5, 0, 0, 0] and aux == {"own": 5, "fading_step": 5}
    assert objective.loss(None, {}, aux, {}, None, None, train=False)[0]["loss"].value == 7


def test_the_recipe_of_illama():
    """In its step the model reads a share that depends on the step, by shapes alone."""
    found = config()
    assert found.objective.entry == SOFT_MASK and found.objective.steps < found.steps
    seen = {}

    class Spy:
        config = found.model

        def __call__(self, batch, *, train=False):
            pass

        def apply(self, variables, batch, **options):
            seen.update(batch)
            return SimpleNamespace(logits=jnp.zeros((2, 10)))

    batch = {"pixels": jnp.zeros((2, 32, 32, 3)), "classes": jnp.zeros(2, jnp.int32)}
    for step, want in ((0, 1.0), (found.objective.steps, 0.0)):
        aux = {"fading_step": jnp.int32(step)}
        found.objective.loss(Spy(), {"params": {}}, aux, batch, jax.random.key(0), None)
        assert seen[SOFT_MASK] == want


def test_wrong_settings():
    with pytest.raises(UsageError, match=r"objective\.steps is 0: want 1 or more"):
        Fading("help", 0)
    with pytest.raises(UsageError, match="want constant or linear"):
        Fading("help", 4, "cosine")
