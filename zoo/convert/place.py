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
    apart: bool = False,
) -> dict[str, Any]:
    """Read parameters and put each where it belongs.

    A stacked parameter is made on its devices and filled row by row, so that no device ever holds
    more than its share and one tensor, nor the host more than one tensor beside what lies on its
    own devices.

    Args:
      pieces: of all parameters, such as `Table.stream` yields.
      shardings: of every path.
      dtype: of floating-point parameters; None keeps what is stored.
      apart: leave the rows of stacked parameters arrays of their own, in a tuple.

    Returns:
      The nested tree of `jax.Array`.
    """
    out: dict[str, Any] = {}
    for piece in pieces:
        for path, array in piece.read().items():
            shape, stored = piece.leaves[path]
            target = cast_to(stored, dtype)
            if piece.row is None:
                out[path] = put(array, target, shardings[path])
                continue
            if apart:
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
