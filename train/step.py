"""One step of training and one of evaluation, compiled."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from zoo.models.core.names import shard
from zoo.models.core.types import Batch
from zoo.train.config import Faults
from zoo.train.objectives import Carried, Mean, Means, Objective, Variables, Variant
from zoo.train.parts import joined
from zoo.train.state import TrainState, variables_of

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, Variant], tuple[TrainState, Metrics]]
_SETTLED = 10
"""Steps after which it is known what the loss is like."""

_MOVED = ("params", "opt_state", "average", "stats", "aux", "typical")
"""What of the state a step at fault leaves as it is."""

_REMEMBERED = 0.98
"""The decay of the mean loss, by which a jump is told: it looks back about fifty steps."""

EvalStep = Callable[[Variables, Any, Batch, jax.Array], dict[str, Mean]]


def make_train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    abstract: TrainState,
    *,
    accumulate: int = 1,
    decay: float | None = None,
    faults: Faults = Faults(),  # noqa: B008 (frozen)
) -> TrainStep:
    """`(state, batch, variant) -> (state, metrics)`, compiled once per static `variant`.

    The given state is used up (donated). Metrics are float32 scalars: those of the objective,
    `grad_norm` before clipping, `lr`, and, as int32, `fault` and `skipped` of the new state. A step
    at fault changes nothing but the number of steps, and those that are left out.

    Args:
      model: the module.
      objective: what it is trained to do.
      optimizer: what moves its parameters.
      learning_rate: its schedule, for the metrics.
      abstract: shapes and shardings of the state.
      accumulate: into how many parts a batch is cut, which follow one another; the gradient is that
        of the whole.
      decay: of the average of the parameters, see `averaged`; None for none.
      faults: when a step is at fault, and whether it is left out. If not, no later one changes
        anything either.
    """

    def step(state: TrainState, batch: Batch, variant: Variant) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def terms_of(params: Any, carried: Carried, part: Batch) -> tuple[Means, Means, Carried]:
            variables = variables_of(joined(params, state.frozen), carried["stats"])
            aux = {**carried["aux"], **state.fixed}
            terms, others, changed = objective.loss(
                model, variables, aux, part, key, variant, train=True
            )
            return terms, others, _merged(carried, changed)

        carried: Carried = {"stats": state.stats, "aux": state.aux}
        if accumulate == 1:
            loss, means, carried, grads = _gradient(terms_of, state.params, carried, batch)
        else:
            parts = _cut(batch, accumulate)
            loss, means, carried, grads = _accumulated_gradient(
                terms_of, state.params, carried, parts
            )
        grad_norm = optax.tree.norm(grads)

        good = jnp.isfinite(jnp.stack([loss, grad_norm])).all()
        counted = state.step - state.skipped
        if faults.spike is not None:
            good &= (counted < _SETTLED) | (loss <= faults.spike * state.typical)
        skipped = state.skipped
        failed = ~good
        if faults.do == "skip":
            skipped = skipped + failed.astype(jnp.int32)
            failed &= skipped > faults.most
        fault = jnp.where((state.fault < 0) & failed, state.step, state.fault)
        good &= fault < 0

        def moved() -> dict[str, Any]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params, average = optax.apply_updates(state.params, updates), state.average
            if decay is not None:
                average = averaged(average, params, decay, counted)
            typical = _typical(state.typical, loss, counted)
            new = {"params": params, "opt_state": opt_state, "average": average, **carried}
            return {**new, "typical": typical}

        def kept() -> dict[str, Any]:
            return {name: getattr(state, name) for name in _MOVED}

        # A branch, and not a choice between numbers: it is computed in place, in one pass.
        changes = jax.lax.cond(good, moved, kept)
        new_state = state.replace(step=state.step + 1, fault=fault, skipped=skipped, **changes)
        metrics = {name: mean.value for name, mean in means.items()}
        lr = jnp.asarray(learning_rate(counted), jnp.float32)
        health = {"fault": fault, "skipped": skipped}
        return new_state, {**metrics, "grad_norm": grad_norm, "lr": lr, **health}

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, static_argnums=2, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(model: nn.Module, objective: Objective) -> EvalStep:
    """`(variables, aux, batch, key) -> means` of one batch; add up totals and weights over batches.

    Nothing changes: running statistics and what the objective carries are used as they are.
    """

    def evaluate(variables: Variables, aux: Any, batch: Batch, key: jax.Array) -> dict[str, Mean]:
        terms, others, _ = objective.loss(
            model, variables, aux, batch, jax.random.wrap_key_data(key), None, train=False
        )
        return {**terms, **others}

    return jax.jit(evaluate)


def averaged(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The exponential moving average after `step` + 1 steps.

    It forgets faster in the beginning, when there is little to remember: the decay is at most
    (1 + step) / (10 + step).
    """
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - keep) * (new - old), average, params)


def _typical(typical: jax.Array, loss: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean loss of the first steps, later one that forgets."""
    keep = jnp.minimum(counted / (counted + 1), _REMEMBERED)
    return keep * typical + (1 - keep) * loss


TermsOf = Callable[[Any, Carried, Batch], tuple[Means, Means, Carried]]


def _gradient(
    terms_of: TermsOf, params: Any, carried: Carried, batch: Batch
) -> tuple[jax.Array, Means, Carried, Any]:
    """Loss, all means, what is carried and the gradient of a batch."""

    def loss_of(params: Any) -> tuple[jax.Array, tuple[Means, Carried]]:
        terms, others, changed = terms_of(params, carried, batch)
        return _sum(mean.value for mean in terms.values()), ({**terms, **others}, changed)

    (loss, (means, carried)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, means, carried, grads


def _accumulated_gradient(
    terms_of: TermsOf, params: Any, carried: Carried, parts: Batch
) -> tuple[jax.Array, Means, Carried, Any]:
    """What `_gradient` gives for the whole batch, its parts [n, B / n, ...] one after another.

    What is carried passes from part to part.
    """

    def weights_of(part: Batch) -> dict[str, jax.Array]:
        return {name: mean.weight for name, mean in terms_of(params, carried, part)[0].items()}

    # Only the weights of this pass are used, so that the compiler leaves all else of it out.
    weights = jax.tree.map(lambda each: each.sum(0), jax.lax.map(weights_of, parts))

    def add(carry: tuple[Means, Any, Carried], part: Batch) -> tuple[Any, None]:
        *sums, carried = carry

        def share_of(params: Any) -> tuple[jax.Array, tuple[Means, Carried]]:
            terms, others, changed = terms_of(params, carried, part)
            share = _sum(Mean(mean.total, weights[name]).value for name, mean in terms.items())
            return share, ({**terms, **others}, changed)

        (_, (means, carried)), grads = jax.value_and_grad(share_of, has_aux=True)(params)
        return (*jax.tree.map(jnp.add, tuple(sums), (means, grads)), carried), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, means, _, grads = jax.eval_shape(lambda p: _gradient(terms_of, params, carried, p), first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (means, grads))
    (means, grads, carried), _ = jax.lax.scan(add, (*nothing, carried), parts)
    return _sum(means[name].value for name in weights), means, carried, grads


def _merged(carried: Carried, changed: Carried) -> Carried:
    """What is carried, with what has changed in it."""
    if unknown := set(changed) - set(carried):
        raise ValueError(f"an objective carries {sorted(unknown)}: want stats and aux")
    aux = {**carried["aux"], **changed.get("aux", {})}
    if new := set(aux) - set(carried["aux"]):
        raise ValueError(f"an objective changes {sorted(new)} of aux: it is fixed, or not of init")
    return {"stats": changed.get("stats", carried["stats"]), "aux": aux}


def _cut(batch: Batch, parts: int) -> Batch:
    """Arrays [B, ...] to [parts, B / parts, ...]; every device keeps the examples that it has."""

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return shard(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(cut, dict(batch))


def _sum(values: Any) -> jax.Array:
    first, *others = values
    return sum(others, first)
