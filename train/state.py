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

HEALTHY = -1
"""The value of `TrainState.fault` as long as all numbers are finite."""


@struct.dataclass
class TrainState:
    """What training carries from step to step.

    Attributes:
      step: int32 [], steps done.
      params: float32 master copy.
      opt_state: of the optimizer.
      key: raw random key, uint32 [2]; step s draws from `fold_in(key, s)`.
      fault: int32 [], the first step whose loss, gradient or update was not finite, else `HEALTHY`.
        From that step on the parameters stay as they were before it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    fault: jax.Array


def boxed_params(model: nn.Module, inputs: Batch) -> Any:
    """Shapes and logical names of the parameters; nothing is computed.

    Raises:
      UsageError: the model has variables that are not parameters.
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    if others := sorted(set(variables) - {"params"}):
        raise UsageError(f"the model keeps {', '.join(others)}: this loop trains parameters only")
    return variables["params"]


def state_bytes(boxed: Any, optimizer: optax.GradientTransformation) -> int:
    """Size of parameters and optimizer state."""
    params = nn.unbox(boxed)
    return nbytes((params, jax.eval_shape(optimizer.init, params)))


def nbytes(tree: Any) -> int:
    """Size of all leaves of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_state(boxed: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings; those of the optimizer follow the parameters'."""
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
    return TrainState(
        step=scalar,
        params=jax.tree.map(_placed, params, shardings),
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
) -> TrainState:
    """The state before the first step, made where it stays. The same for every mesh."""

    def init(seed: jax.Array) -> TrainState:
        params_key, key = jax.random.split(jax.random.key(seed))
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(inputs))
        params = nn.unbox(model.init(params_key, batch)["params"])
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            key=jax.random.key_data(key),
            fault=jnp.int32(HEALTHY),
        )

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # It runs once: on a CPU, optimising the many small random draws takes longer than drawing.
    quick = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    run = jax.jit(init, out_shardings=shardings, compiler_options=quick)
    return run(np.uint32(seed % 2**32))


def describe(abstract_params: Any) -> Iterator[str]:
    """A line for each parameter: path, shape, sharding and MiB per device."""
    for path, leaf in jax.tree.leaves_with_path(abstract_params):
        share = leaf.sharding.shard_shape(leaf.shape)
        mib = np.prod(share) * leaf.dtype.itemsize / 2**20
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield f"{name}  {leaf.shape}  {leaf.sharding.spec}  {mib:.3f} MiB"


def norms_by_part(params: Mapping[str, Any]) -> dict[str, float]:
    """Global norm of the parameters below each top-level name."""
    return {name: float(optax.tree.norm(part)) for name, part in params.items()}


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
