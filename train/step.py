"""One step of training and one of evaluation, compiled."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from zoo.models.core.names import shard
from zoo.models.core.types import Batch
from zoo.train.objectives import Mean, Means, Objective, Variant
from zoo.train.parts import joined
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
    *,
    accumulate: int = 1,
    decay: float | None = None,
) -> TrainStep:
    """`(state, batch, variant) -> (state, metrics)`, compiled once per static `variant`.

    The given state is used up (donated). Metrics are float32 scalars: those of the objective,
    `grad_norm` before clipping, and `lr`. A step that is not finite leaves the parameters alone and
    is recorded in `state.fault`.

    Args:
      model: the module.
      objective: what it is trained to do.
      optimizer: what moves its parameters.
      learning_rate: its schedule, for the metrics.
      abstract: shapes and shardings of the state.
      accumulate: into how many parts a batch is cut, which follow one another; the gradient is that
        of the whole.
      decay: of the average of the parameters, see `averaged`; None for none.
    """

    def step(state: TrainState, batch: Batch, variant: Variant) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def terms_of(params: Any, part: Batch) -> tuple[Means, Means]:
            return objective.loss(model, joined(params, state.frozen), part, key, variant)

        if accumulate == 1:
            loss, means, grads = _gradient(terms_of, state.params, batch)
        else:
            parts = _cut(batch, accumulate)
            loss, means, grads = _accumulated_gradient(terms_of, state.params, parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        grad_norm = optax.tree.norm(grads)

        finite = jnp.isfinite(jnp.stack([loss, grad_norm, optax.tree.norm(updates)])).all()
        failed = jnp.where(finite, state.fault, state.step)
        fault = jnp.where(state.fault < 0, failed, state.fault)

        def unless_failed(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(fault < 0, n, o), new, old)

        params = unless_failed(optax.apply_updates(state.params, updates), state.params)
        average = state.average
        if decay is not None:
            average = unless_failed(averaged(average, params, decay, state.step), average)
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=unless_failed(opt_state, state.opt_state),
            average=average,
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
        terms, others = objective.loss(model, params, batch, jax.random.wrap_key_data(key), None)
        return {**terms, **others}

    return jax.jit(evaluate)


def averaged(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The exponential moving average after `step` + 1 steps.

    It forgets faster in the beginning, when there is little to remember: the decay is at most
    (1 + step) / (10 + step).
    """
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - keep) * (new - old), average, params)


TermsOf = Callable[[Any, Batch], tuple[Means, Means]]


def _gradient(terms_of: TermsOf, params: Any, batch: Batch) -> tuple[jax.Array, Means, Any]:
    """Loss, all means and the gradient of a batch."""

    def loss_of(params: Any) -> tuple[jax.Array, Means]:
        terms, others = terms_of(params, batch)
        return _sum(mean.value for mean in terms.values()), {**terms, **others}

    (loss, means), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, means, grads


def _accumulated_gradient(
    terms_of: TermsOf, params: Any, parts: Batch
) -> tuple[jax.Array, Means, Any]:
    """What `_gradient` gives for the whole batch, its parts [n, B / n, ...] one after another."""

    def weights_of(part: Batch) -> dict[str, jax.Array]:
        return {name: mean.weight for name, mean in terms_of(params, part)[0].items()}

    # Only the weights of this pass are used, so that the compiler leaves all else of it out.
    weights = jax.tree.map(lambda each: each.sum(0), jax.lax.map(weights_of, parts))

    def add(carry: tuple[Means, Any], part: Batch) -> tuple[tuple[Means, Any], None]:
        def share_of(params: Any) -> tuple[jax.Array, Means]:
            terms, others = terms_of(params, part)
            share = _sum(Mean(mean.total, weights[name]).value for name, mean in terms.items())
            return share, {**terms, **others}

        (_, means), grads = jax.value_and_grad(share_of, has_aux=True)(params)
        return jax.tree.map(jnp.add, carry, (means, grads)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, *shapes = jax.eval_shape(lambda part: _gradient(terms_of, params, part), first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(shapes))
    (means, grads), _ = jax.lax.scan(add, nothing, parts)
    return _sum(means[name].value for name in weights), means, grads


def _cut(batch: Batch, parts: int) -> Batch:
    """Arrays [B, ...] to [parts, B / parts, ...]; every device keeps the examples that it has."""

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return shard(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(cut, dict(batch))


def _sum(values: Any) -> jax.Array:
    first, *others = values
    return sum(others, first)
