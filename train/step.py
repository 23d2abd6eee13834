"""One step of training and one of evaluation, compiled."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from zoo.models.core.types import Batch
from zoo.train.objectives import Mean, Objective, Variant
from zoo.train.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, Variant], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Batch, jax.Array], dict[str, Mean]]


def make_train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    abstract: TrainState,
) -> TrainStep:
    """`(state, batch, variant) -> (state, metrics)`, compiled once per static `variant`.

    The given state is used up (donated). Metrics are float32 scalars: those of the objective,
    `grad_norm` before clipping, and `lr`. A step that is not finite leaves the parameters alone and
    is recorded in `state.fault`.
    """

    def step(state: TrainState, batch: Batch, variant: Variant) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss_of(params: Any) -> tuple[jax.Array, dict[str, Mean]]:
            return objective.loss(model, params, batch, key, variant)

        (loss, means), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        grad_norm = optax.tree.norm(grads)

        finite = jnp.isfinite(jnp.stack([loss, grad_norm, optax.tree.norm(updates)])).all()
        failed = jnp.where(finite, state.fault, state.step)
        fault = jnp.where(state.fault < 0, failed, state.fault)

        def unless_failed(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(fault < 0, n, o), new, old)

        new_state = state.replace(
            step=state.step + 1,
            params=unless_failed(optax.apply_updates(state.params, updates), state.params),
            opt_state=unless_failed(opt_state, state.opt_state),
            fault=fault,
        )
        metrics = {name: mean.value for name, mean in means.items()}
        lr = jnp.asarray(learning_rate(state.step), jnp.float32)
        return new_state, {**metrics, "grad_norm": grad_norm, "lr": lr}

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, static_argnums=2, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(model: nn.Module, objective: Objective) -> EvalStep:
    """`(params, batch, key) -> means` of one batch; add up totals and weights over batches."""

    def evaluate(params: Any, batch: Batch, key: jax.Array) -> dict[str, Mean]:
        return objective.loss(model, params, batch, jax.random.wrap_key_data(key), None)[1]

    return jax.jit(evaluate)
