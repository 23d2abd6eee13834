"""Parameters straight to their devices, a tensor at a time."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import Piece
from zoo.models.core.names import tree_shardings
from zoo.models.core.tree import flat_paths, nested

FLOATS = ("float32", "bfloat16", "float16")
"""Names of the dtypes that parameters can be loaded in."""

STATS = "stats"
"""The name below which running statistics stand where they travel together with parameters."""

_ALIGNMENT = 64
"""Bytes; JAX takes host arrays that begin at a multiple of it as they are, others it copies."""


def as_float(dtype: Any) -> np.dtype | None:
    """The NumPy dtype of a name or type; None stays None.

    Raises:
      UsageError: it is none of `FLOATS`.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise UsageError(f"dtype is {dtype!r}: want one of {', '.join(FLOATS)}, or None")
    return found


def abstract_params(config: ModelConfig) -> Any:
    """Boxed shapes of a model's parameters, with the logical names of their axes."""
    model = config.build()
    return jax.eval_shape(model.init, jax.random.key(0), config.inputs(1))["params"]


def abstract_variables(config: ModelConfig) -> Any:
    """As `abstract_params`; the running statistics of a model that keeps some stand below `STATS`,
    beside the parameters, as they do in the tables of checkpoints.
    """
    model = config.build()
    made = jax.eval_shape(model.init, jax.random.key(0), config.inputs(1))
    return together(made["params"], made.get(STATS, {}))


def together(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of parameters and running statistics."""
    return {**params, **({STATS: stats} if stats else {})}


def apart(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the running statistics of a tree of both."""
    return {name: leaf for name, leaf in tree.items() if name != STATS}, tree.get(STATS, {})


def is_stats(path: str) -> bool:
    """Whether a path is one of running statistics."""
    return path.startswith(f"{STATS}/")


def shardings_of(boxed: Any, mesh: Mesh | None) -> dict[str, Sharding]:
    """{path: where a parameter lies}; without a mesh that is the default device."""
    if mesh is None:
        one = SingleDeviceSharding(jnp.zeros(()).device)
        return dict.fromkeys(flat_paths(nn.unbox(boxed)), one)
    return flat_paths(tree_shardings(boxed, mesh))


def place(
    pieces: Iterable[Piece],
    shardings: Mapping[str, Sharding],
    dtype: np.dtype | None,
    *,
    in_rows: bool = False,
) -> dict[str, Any]:
    """Read parameters and put each where it belongs.

    A stacked parameter is made on its devices and filled row by row, so that no device ever holds
    more than its share and one tensor, nor the host more than one tensor beside what lies on its
    own devices.

    Args:
      pieces: of all parameters, such as `Table.stream` yields.
      shardings: of every path.
      dtype: of floating-point parameters; None keeps what is stored. Running statistics are
        float32 in any case.
      in_rows: leave the rows of stacked parameters arrays of their own, in a tuple.

    Returns:
      The nested tree of `jax.Array`.
    """
    out: dict[str, Any] = {}
    for piece in pieces:
        for path, array in piece.read().items():
            shape, stored = piece.leaves[path]
            target = np.dtype(np.float32) if is_stats(path) else cast_to(stored, dtype)
            if piece.row is None:
                out[path] = put(array, target, shardings[path])
                continue
            if in_rows and not is_stats(path):
                rows = out.get(path, (None,) * shape[0])
                row = put(array, target, shardings[path])
                out[path] = (*rows[: piece.row], row, *rows[piece.row + 1 :])
                continue
            if path not in out:
                out[path] = _zeros(shape, target, shardings[path])()
            row = put(array, target, _of_a_row(shardings[path]))
            out[path] = _write(out[path], row, np.int32(piece.row))
            out[path].block_until_ready()  # or rows would queue up
    return nested(out)


def put(array: np.ndarray, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """An array on devices, of which each is sent its own part only."""
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: _aligned(array[part], dtype)
    )


def cast_to(stored: np.dtype, dtype: np.dtype | None) -> np.dtype:
    """The dtype of a parameter: only floating-point ones change."""
    return dtype if dtype is not None and jnp.issubdtype(stored, jnp.floating) else stored


def _aligned(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy that JAX need not copy once more."""
    size = array.size * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    out = memory[start : start + size].view(dtype).reshape(array.shape)
    np.copyto(out, array, casting="unsafe")
    return out


@cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, row: jax.Array, r: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, row, r, 0)


def _of_a_row(sharding: Sharding) -> Sharding:
    """Where a row of a stacked array lies: rows are never divided among devices."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
