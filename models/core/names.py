"""Logical axis names of parameters and activations, and their strict resolution to mesh axes.

Modules label arrays with logical names (`nn.with_logical_partitioning` is used as a label only);
nothing but `spec_for` turns names into a `PartitionSpec`. An unknown name and a mesh axis used
twice in one array raise; a dimension that its mesh axes do not divide is replicated.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "seq", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = MappingProxyType(
    {
        # parameters
        "embed": "fsdp",
        "mlp": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "vocab": ("tensor", "fsdp"),
        "vocab_embed": None,
        "experts": "expert",
        "layers": None,
        "conv_in": None,
        "conv_out": "fsdp",
        "codes": None,
        "classes": None,
        "positions": None,
        "queries": None,
        "norm": None,
        # activations
        "batch": ("data", "fsdp"),
        "seq": "seq",
        "act_embed": None,
        "act_mlp": "tensor",
        "act_heads": "tensor",
        "height": None,
        "width": None,
    }
)
"""Fully sharded data parallelism over `fsdp`, Megatron-style splits over `tensor`; `vocab_embed` is
the feature axis of a vocabulary table, of which only the vocabulary axis is sharded.
"""


def spec_for(
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules = DEFAULT_RULES,
) -> PartitionSpec:
    """The `PartitionSpec` of an array of `shape` whose axes are called `names`.

    Raises:
      ValueError: a name without a rule, a mesh axis used for two dimensions, or not one name per
        dimension.
    """
    if len(names) != len(shape):
        raise ValueError(
            f"names {names} and shape {shape}: one name (or None) per dimension, please"
        )
    used: set[str] = set()
    spec: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is None:
            spec.append(None)
            continue
        if name not in rules:
            near = difflib.get_close_matches(name, rules, 3)
            raise ValueError(
                f"unknown logical axis {name!r} in {names}; nearest: {', '.join(near)}"
            )
        rule = rules[name] or ()
        axes = tuple(
            a for a in ((rule,) if isinstance(rule, str) else rule) if mesh.shape.get(a, 1) > 1
        )
        if twice := used.intersection(axes):
            raise ValueError(
                f"mesh axis {sorted(twice)} would be used twice for {names} of {shape}"
            )
        ways = 1
        for axis in axes:
            ways *= mesh.shape[axis]
        if not axes or size % ways:
            spec.append(None)
            continue
        used.update(axes)
        spec.append(axes[0] if len(axes) == 1 else axes)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def tree_names(boxed: Any) -> Any:
    """The logical names of every leaf of a boxed tree; the axes of unboxed leaves are unnamed."""
    return jax.tree.map(
        lambda leaf: leaf.names if _is_boxed(leaf) else (None,) * leaf.ndim,
        boxed,
        is_leaf=_is_boxed,
    )


def tree_shardings(boxed: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """`NamedSharding` of every parameter of a boxed tree, such as `jax.eval_shape(model.init,
    …)["params"]`.

    The result has the structure of `nn.unbox(boxed)`.
    """

    def resolve(leaf: Any) -> NamedSharding:
        names, value = (leaf.names, leaf.value) if _is_boxed(leaf) else ((None,) * leaf.ndim, leaf)
        return NamedSharding(mesh, spec_for(names, value.shape, mesh, rules))

    return jax.tree.map(resolve, boxed, is_leaf=_is_boxed)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation to the current mesh (`jax.set_mesh`); without one, just `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(names, x.shape, mesh))


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
