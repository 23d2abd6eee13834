"""Low-rank adapters of any linear maps of any model, chosen by the paths of their kernels.

They exist in two forms. Beside a `kernel` of a tree of arrays stand `lora_a`, `lora_b` and
`lora_scale`, which can be trained, saved and laid out like all parameters. `attach` makes one
operand of each four, which `model.apply` takes; `detach` is its inverse.

The adapters of stacked layers are stacked like their kernels, one for every row.
"""

import difflib
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.tree import flat_paths, nested
from zoo.models.core.types import Array
from zoo.models.parts.layers.linear import LinearKernel
from zoo.models.parts.layers.operands import LowRank

KERNEL, A, B, SCALE = "kernel", "lora_a", "lora_b", "lora_scale"


def linear_kernels(boxed: Mapping[str, Any]) -> dict[str, LinearKernel]:
    """{path: box} of all kernels of a model that can have an adapter."""
    flat = flat_paths(boxed)
    return {path: leaf for path, leaf in flat.items() if isinstance(leaf, LinearKernel)}


def targets(boxed: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, LinearKernel]:
    """Those kernels whose whole path some pattern matches.

    Args:
      boxed: shapes of a model's parameters with the names of their axes.
      patterns: regular expressions.

    Raises:
      UsageError: a pattern is no regular expression, or matches no kernel of a linear map.
    """
    kernels = linear_kernels(boxed)
    found: dict[str, LinearKernel] = {}
    for pattern in patterns:
        try:
            matched = {path: box for path, box in kernels.items() if re.fullmatch(pattern, path)}
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from None
        if not matched:
            near = difflib.get_close_matches(pattern, kernels, 4, 0.0)
            raise UsageError(
                f"{pattern!r} matches the kernel of no linear map; nearest: {', '.join(near)}"
            )
        found |= matched
    return dict(sorted(found.items()))


def adapters(kernels: Mapping[str, LinearKernel], rank: int) -> dict[str, Any]:
    """Boxed shapes of the adapters, float32; they are divided among devices as their kernels are.

    Args:
      kernels: of `targets`.
      rank: R, of all of them.
    """
    out: dict[str, Any] = {}
    for path, box in kernels.items():
        shape, names = box.value.shape, box.names
        lead = len(shape) - box.num_in - box.num_out
        middle = lead + box.num_in
        parent = path.rpartition("/")[0]
        out[f"{parent}/{A}"] = _shape((*shape[:middle], rank), (*names[:middle], None))
        b_shape = (*shape[:lead], rank, *shape[middle:])
        out[f"{parent}/{B}"] = _shape(b_shape, (*names[:lead], None, *names[middle:]))
        out[f"{parent}/{SCALE}"] = _shape(shape[:lead], names[:lead])
    return nested(out)


def draw(shapes: Mapping[str, Any], key: Array, scale: float) -> dict[str, Any]:
    """Adapters that change nothing yet: `a` uniform with the bound 1 / sqrt(fan-in), `b` zero.

    Args:
      shapes: of `adapters`.
      key: random key; each adapter draws by its own path.
      scale: of all of them.
    """
    out: dict[str, Any] = {}
    flat = flat_paths(nn.unbox(shapes))
    for path, leaf in flat.items():
        name = path.rpartition("/")[2]
        if name == A:
            lead = flat[path.removesuffix(A) + SCALE].ndim
            bound = 1 / math.sqrt(math.prod(leaf.shape[lead:-1]))
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            out[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
        else:
            out[path] = jnp.full(leaf.shape, scale if name == SCALE else 0.0, leaf.dtype)
    return nested(out)


def attach(params: Any) -> Any:
    """The tree in which each kernel that has an adapter beside it is the operand of the two."""
    if not isinstance(params, Mapping):
        return params
    out = {name: attach(leaf) for name, leaf in params.items()}
    if A in out:
        a, b, scale = (out.pop(name) for name in (A, B, SCALE))
        out[KERNEL] = LowRank(out[KERNEL], a, b, scale)
    return out


def detach(params: Any) -> Any:
    """The inverse of `attach`."""
    if not isinstance(params, Mapping):
        return params
    out = {name: detach(leaf) for name, leaf in params.items()}
    if isinstance(kernel := out.get(KERNEL), LowRank):
        out |= {KERNEL: kernel.base, A: kernel.a, B: kernel.b, SCALE: kernel.scale}
    return out


def _shape(shape: tuple[int, ...], names: tuple[str | None, ...]) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
