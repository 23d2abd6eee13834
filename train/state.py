"""Everything that a step changes, and how it lies on the devices."""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_shardings
from zoo.models.core.types import Batch
from zoo.train.parts import divided_like, joined

HEALTHY = -1
"""The value of `TrainState.fault` as long as all numbers are finite."""


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
      fault: int32 [], the first step whose loss, gradient or update was not finite, else `HEALTHY`.
        From that step on the parameters stay as they were before it.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    average: Any
    key: jax.Array
    fault: jax.Array

    @property
    def served(self) -> Any:
        """All parameters as they are evaluated and exported: averages where there are some."""
        return joined(self.params if self.average is None else self.average, self.frozen)


def boxed_params(model: nn.Module, inputs: Batch) -> Any:
    """Shapes and logical names of the parameters; nothing is computed.

    Raises:
      UsageError: the model has variables that are not parameters.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    if others := sorted(set(variables) - {"params"}):
        raise UsageError(f"the model keeps {', '.join(others)}: this loop trains parameters only")
    return variables["params"]


def state_bytes(
    boxed: Any, optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> int:
    """Size of the parameters that train, of their averages if there are any, and of the optimizer
    state.
    """
    params = nn.unbox(boxed)
    state = jax.eval_shape(optimizer.init, params)
    return nbytes((params, params if averaged else None, state))


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
) -> TrainState:
    """The state as shapes with shardings; those of the optimizer follow the parameters'.

    Args:
      boxed: the parameters that train.
      optimizer: what moves them.
      mesh: where all lie.
      frozen: the boxed parameters that do not train.
      averaged: whether an average of the parameters is kept.
    """
    params = nn.unbox(boxed)
    shardings = tree_shardings(boxed, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(optimizer.init, params)
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def follow(path: Any, leaf: Any) -> NamedSharding:
        # What belongs to a parameter ends in its path and has its shape, whatever wraps it.
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, everywhere))
            if shape == leaf.shape:
                return sharding
        return everywhere

    opt_shardings = jax.tree.map_with_path(follow, opt_state)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    placed = jax.tree.map(_placed, params, shardings)
    frozen = {} if frozen is None else frozen
    return TrainState(
        step=scalar,
        params=placed,
        frozen=jax.tree.map(_placed, nn.unbox(frozen), tree_shardings(frozen, mesh)),
        average=placed if averaged else None,
        opt_state=jax.tree.map(_placed, opt_state, opt_shardings),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere),
        fault=scalar,
    )


def initial_state(
    model: nn.Module,
    inputs: Batch,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    start: Any = None,
) -> TrainState:
    """The state before the first step, made where it stays. The same for every mesh.

    Args:
      model: the module.
      inputs: shapes of a batch.
      optimizer: what moves the parameters.
      abstract: shapes and shardings of the state.
      seed: decides initial parameters and everything drawn while training.
      start: all parameters, which are used up; None: they are drawn.
    """

    def init(seed: jax.Array, params: Any) -> TrainState:
        params_key, key = jax.random.split(jax.random.key(seed))
        if params is None:
            batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(inputs))
            params = nn.unbox(model.init(params_key, batch)["params"])
        trained, frozen = divided_like(params, abstract.params)
        return TrainState(
            step=jnp.int32(0),
            params=trained,
            frozen=frozen,
            opt_state=optimizer.init(trained),
            # Copies: the step is given all of the state to use up, each buffer once.
            average=None if abstract.average is None else jax.tree.map(jnp.copy, trained),
            key=jax.random.key_data(key),
            fault=jnp.int32(HEALTHY),
        )

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # It runs once: on a CPU, optimising the many small random draws takes longer than drawing.
    quick = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    run = jax.jit(init, out_shardings=shardings, compiler_options=quick, donate_argnums=1)
    return run(np.uint32(seed % 2**32), start)


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


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
