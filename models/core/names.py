"""Logical axis names of parameters and activations, and their strict resolution to mesh axes.

Modules label arrays with logical names (`nn.with_logical_partitioning` is used as a label only);
nothing but `spec_for` turns names into a `PartitionSpec`. An unknown name and a mesh axis used
twice in one array raise; a dimension that its mesh axes do not divide is replicated.

Which names lie along which axes of the mesh is a set of rules, `DEFAULT_RULES` unless others are in
force (`use_rules`).
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
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
        "batch": ("data", "fsdp", "expert"),
        "seq": "seq",
        "act_embed": None,
        "act_mlp": "tensor",
        "act_heads": "tensor",
        "height": None,
        "width": None,
    }
)
"""Fully sharded data parallelism over `fsdp`, Megatron-style splits over `tensor`; `vocab_embed` is
the feature axis of a vocabulary table, of which only the vocabulary axis is sharded. The batch is
divided over `expert` too: outside of expert layers, whose devices have experts of their own, these
are copies of the model like those along `data`.
"""

_in_force: ContextVar[Rules] = ContextVar("rules", default=DEFAULT_RULES)


@contextlib.contextmanager
def use_rules(changes: Rules) -> Iterator[None]:
    """Let names be resolved by the default rules with these changes, in this thread.

    Programs that were traced before keep the rules that they were traced with.

    Raises:
      ValueError: no array has an axis, or no mesh, that is called so.
    """
    for name, axes in changes.items():
        if name not in DEFAULT_RULES:
            raise ValueError(f"a rule for {name!r}: {_unknown(name, DEFAULT_RULES)}")
        for axis in _axes(axes):
            if axis not in MESH_AXES:
                raise ValueError(f"the rule {name} -> {axis}: want axes of {', '.join(MESH_AXES)}")
    token = _in_force.set(MappingProxyType({**DEFAULT_RULES, **changes}))
    try:
        yield
    finally:
        _in_force.reset(token)


def spec_for(
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules | None = None,
) -> PartitionSpec:
    """The `PartitionSpec` of an array of `shape` whose axes are called `names`.

    Args:
      names: one for each dimension, None for one that is not divided.
      shape: of the array.
      mesh: of devices.
      rules: by which names are resolved; those in force by default.

    Raises:
      ValueError: a name without a rule, a mesh axis used for two dimensions, or not one name per
        dimension.
    """
    if len(names) != len(shape):
        raise ValueError(
            f"names {names} and shape {shape}: one name (or None) per dimension, please"
        )
    rules = _in_force.get() if rules is None else rules
    # Within `jax.shard_map` arrays are the parts along its axes already.
    ways_along = {a: n for a, n in mesh.shape.items() if n > 1 and a not in mesh.manual_axes}
    used: set[str] = set()
    spec: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is None:
            spec.append(None)
            continue
        if name not in rules:
            raise ValueError(f"unknown logical axis {name!r} in {names}; {_unknown(name, rules)}")
        axes = tuple(axis for axis in _axes(rules[name]) if axis in ways_along)
        if twice := used.intersection(axes):
            raise ValueError(
                f"mesh axis {sorted(twice)} would be used twice for {names} of {shape}"
            )
        ways = 1
        for axis in axes:
            ways *= ways_along[axis]
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


def tree_shardings(boxed: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
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


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree lie on, the first that one names; None without any."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    found = (each.mesh for each in shardings if isinstance(each, NamedSharding))
    return next((mesh for mesh in found if isinstance(mesh, Mesh)), None)


@contextlib.contextmanager
def on_mesh_of(tree: Any) -> Iterator[None]:
    """Let the mesh of a model's parameters be in force, so that its activations and caches are
    divided as they are; nothing happens where one is in force already, or there is none.
    """
    mesh = mesh_of(tree) if jax.sharding.get_abstract_mesh().empty else None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def _axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def _unknown(name: str, known: Rules) -> str:
    return f"nearest: {', '.join(difflib.get_close_matches(name, known, 3)) or 'none'}"


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
