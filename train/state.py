"""Everything that a step changes, and how it lies on the devices."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo.models.core.compiled import quick_options
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_shardings
from zoo.models.core.types import Batch
from zoo.models.parts.layers.low_rank import attach
from zoo.models.parts.layers.operands import merge
from zoo.train.objectives import Objective, Variables
from zoo.train.parts import divided_like, joined

HEALTHY = -1
"""The value of `TrainState.fault` as long as no step was at fault."""


@struct.dataclass
class TrainState:
    """What training carries from step to step.

    Attributes:
      step: int32 [], steps done.
      params: float32 master copy of what trains.
      frozen: the parameters that do not.
      opt_state: of the optimizer.
      average: the exponential moving average of `params`, or None.
      key: raw random key, uint32 [2]; step s draws from `fold_in(key, s)`.
      fault: int32 [], the first step at fault that was not just left out, else `HEALTHY`.
        From that step on everything but `step` stays as it was before it.
      skipped: int32 [], steps that were at fault and left out, see `zoo.train.config.Faults`.
      typical: float32 [], the mean loss of late, of steps that were not at fault.
      stats: running statistics of the model; {} for most models.
      aux: what the objective carries from step to step; {} for most objectives.
      fixed: what the objective carries unchanged, such as a teacher.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    average: Any
    key: jax.Array
    fault: jax.Array
    skipped: jax.Array
    typical: jax.Array
    stats: Any = field(default_factory=dict)
    aux: Any = field(default_factory=dict)
    fixed: Any = field(default_factory=dict)

    @property
    def served(self) -> Any:
        """All parameters as they are evaluated and exported: averages where there are some."""
        return joined(self.params if self.average is None else self.average, self.frozen)

    @property
    def variables(self) -> Variables:
        """All variables of the model as they are evaluated and exported."""
        return variables_of(self.served, self.stats)

    @property
    def merged(self) -> Any:
        """The model's parameters as they are exported: adapters are merged into their kernels."""
        return merge(self.variables["params"])


def variables_of(params: Any, stats: Any) -> Variables:
    """What a module is applied to; adapters stand in the place of the kernels they belong to."""
    whole = attach(params)
    return {"params": whole, "stats": stats} if stats else {"params": whole}


def boxed_variables(model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Shapes and logical names of `params`, and of `stats` if there are any; nothing is computed.

    Raises:
      UsageError: the model has variables of another kind.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    if others := sorted(set(variables) - {"params", "stats"}):
        raise UsageError(
            f"the model keeps {', '.join(others)}: want only `params`, and `stats`, which are its "
            "running statistics"
        )
    return dict(variables)


def boxed_params(model: nn.Module, inputs: Batch) -> Any:
    """Shapes and logical names of the parameters; raises as `boxed_variables`."""
    return boxed_variables(model, inputs)["params"]


def boxed_aux(
    objective: Objective, model: nn.Module, variables: Any, inputs: Batch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of what an objective carries, changing and fixed, named where it names them."""
    aux = jax.eval_shape(lambda v: objective.init(model, v, inputs), nn.unbox(variables))
    return _without(aux, objective.fixed), _only(aux, objective.fixed)


def _only(aux: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in aux.items() if name in names}


def _without(aux: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in aux.items() if name not in names}


def state_bytes(
    boxed: Any,
    optimizer: optax.GradientTransformation,
    *,
    averaged: bool = False,
    others: Any = None,
) -> int:
    """Size of the parameters that train, of their averages if there are any, of the optimizer state
    and of all `others`.
    """
    params = nn.unbox(boxed)
    state = jax.eval_shape(optimizer.init, params)
    return nbytes((params, params if averaged else None, state, nn.unbox(others)))


def nbytes(tree: Any) -> int:
    """Size of all leaves of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_state(
    boxed: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    frozen: Any = None,
    averaged: bool = False,
    stats: Any = None,
    aux: Any = None,
    fixed: Any = None,
) -> TrainState:
    """The state as shapes with shardings; what belongs to a parameter lies as it does.

    Args:
      boxed: the parameters that train.
      optimizer: what moves them.
      mesh: where all lie.
      frozen: the boxed parameters that do not train.
      averaged: whether an average of the parameters is kept.
      stats: boxed running statistics of the model.
      aux: boxed shapes of what the objective carries.
      fixed: those of what it never changes.
    """
    params = nn.unbox(boxed)
    shardings = tree_shardings(boxed, mesh)
    frozen = {} if frozen is None else frozen
    frozen_shardings = tree_shardings(frozen, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(optimizer.init, params)
    known = {
        path: (leaf.shape, sharding)
        for tree, where in ((params, shardings), (nn.unbox(frozen), frozen_shardings))
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(where), strict=True
        )
    }

    def follow(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # What belongs to a parameter ends in its path and has its shape, whatever wraps it.
        if _is_boxed(leaf):
            return _placed(leaf.value, tree_shardings(leaf, mesh))
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, everywhere))
            if shape == leaf.shape:
                return _placed(leaf, sharding)
        return _placed(leaf, everywhere)

    def following(tree: Any) -> Any:
        return jax.tree.map_with_path(follow, {} if tree is None else tree, is_leaf=_is_boxed)

    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    placed = jax.tree.map(_placed, params, shardings)
    return TrainState(
        step=scalar,
        params=placed,
        frozen=jax.tree.map(_placed, nn.unbox(frozen), frozen_shardings),
        average=placed if averaged else None,
        opt_state=following(opt_state),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere),
        fault=scalar,
        skipped=scalar,
        typical=jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
        stats=following(stats),
        aux=following(aux),
        fixed=following(fixed),
    )


def initial_state(
    model: nn.Module,
    inputs: Batch,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    start: Any = None,
    *,
    stats: Any = None,
    objective: Objective | None = None,
    loaded: Any = None,
    adapters: Callable[[jax.Array], Any] | None = None,
) -> TrainState:
    """The state before the first step, made where it stays. The same for every mesh.

    Args:
      model: the module.
      inputs: shapes of a batch.
      optimizer: what moves the parameters.
      abstract: shapes and shardings of the state.
      seed: decides initial parameters and everything drawn while training.
      start: all parameters, which are used up; None: they are drawn.
      stats: running statistics of the model that training starts from; None: those of a new one.
      objective: what is carried is its own; None: nothing is.
      loaded: entries of what is carried that come from files, which are used up.
      adapters: draws low-rank adapters by a key; None: there are none.
    """
    objective = Objective() if objective is None else objective

    def init(seed: jax.Array, params: Any, stats: Any, loaded: Any) -> TrainState:
        params_key, key = jax.random.split(jax.random.key(seed))
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(inputs))
        if params is None or (stats is None and abstract.stats):
            fresh = nn.unbox(model.init(params_key, batch))
            params = fresh["params"] if params is None else params
            stats = fresh.get("stats", {}) if stats is None else stats
        if adapters is not None:
            params = joined(adapters(jax.random.fold_in(params_key, 1)), params)
        aux = nn.unbox(objective.init(model, variables_of(params, stats), inputs))
        # Copies: the step is given all of the state to use up, each buffer once.
        aux = jax.tree.map(jnp.copy, aux) | (loaded or {})
        trained, frozen = divided_like(params, abstract.params)
        return TrainState(
            step=jnp.int32(0),
            params=trained,
            frozen=frozen,
            opt_state=optimizer.init(trained),
            average=None if abstract.average is None else jax.tree.map(jnp.copy, trained),
            key=jax.random.key_data(key),
            fault=jnp.int32(HEALTHY),
            skipped=jnp.int32(0),
            typical=jnp.float32(0),
            stats=stats or {},
            aux=_without(aux, objective.fixed),
            fixed=_only(aux, objective.fixed),
        )

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    options = quick_options()
    run = jax.jit(init, out_shardings=shardings, compiler_options=options, donate_argnums=(1, 3))
    return run(np.uint32(seed % 2**32), start, stats, loaded)


def describe(abstract: TrainState) -> Iterator[str]:
    """A line for each parameter: path, shape, sharding, MiB per device, whether it is frozen."""
    for tree, note in ((abstract.params, ""), (abstract.frozen, "  frozen")):
        for path, leaf in jax.tree.leaves_with_path(tree):
            share = leaf.sharding.shard_shape(leaf.shape)
            mib = np.prod(share) * leaf.dtype.itemsize / 2**20
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield f"{name}  {leaf.shape}  {leaf.sharding.spec}  {mib:.3f} MiB{note}"


def norms_by_part(params: Mapping[str, Any]) -> dict[str, float]:
    """Global norm of the parameters below each top-level name."""
    return {name: float(optax.tree.norm(part)) for name, part in params.items()}


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
