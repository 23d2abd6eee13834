"""Logits of a few tokens at a time, because those of all of them may not fit in memory."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from zoo.models.core.names import spec_for
from zoo.models.core.types import Array
from zoo.models.parts.layers.sequence import sequence_ranks

WHOLE_LOGITS = 1 << 23
"""The most logits of one example, tokens x vocabulary, that are computed at once by default."""

T = TypeVar("T")

Head = Callable[[Any, Array], Array]
"""Variables and hidden states [B, L, D] to logits [B, L, V]."""


def chunk_of(head: Head, variables: Any, hidden: Array, chunk: int | None) -> int:
    """`chunk` tokens; by default as many as keep within `WHOLE_LOGITS` an example on each of the
    devices that share its sequence.

    Args:
      head: variables and hidden states to logits.
      variables: what it reads.
      hidden: [B, L, D].
      chunk: None for the default.
    """
    if chunk is not None:
        return chunk
    vocabulary = jax.eval_shape(head, variables, hidden[:, :1]).shape[-1]
    return max(1, WHOLE_LOGITS // vocabulary) * sequence_ranks()


def in_chunks(
    sums: Callable[..., T],
    variables: Any,
    arrays: Sequence[Array],
    fillers: Sequence[int],
    chunk: int,
) -> T:
    """`sums(variables, *arrays)`, for `chunk` tokens at a time and again for the gradient.

    On a mesh each device does that with its own examples, and its own part of their tokens.
    Kernels that are divided come to it once, in the dtype that they are multiplied in, and their
    gradients are added up over the devices once, after the last chunk. Left to itself the compiler
    sends the examples of all devices to each part of a kernel, and adds gradients up in every
    chunk.

    Args:
      sums: of variables and arrays [B, n, ...]: a tree of sums over the tokens, each [], or [B]
        for those of every example.
      variables: a tree, of which `sums` may read a part.
      arrays: [B, L, ...] each, hidden states first.
      fillers: of each, what stands for no token, of which nothing is added.
      chunk: tokens of a row that are in memory at once, on all devices that share it together.
    """
    rows, tokens = _divided_over(arrays[0])
    if not rows + tokens:
        return _scanned(functools.partial(sums, variables), arrays, fillers, chunk)
    mesh = jax.sharding.get_abstract_mesh()
    chunk = max(1, chunk // math.prod(mesh.shape[axis] for axis in tokens))
    leaves, form = jax.tree.flatten(variables)
    read, shapes = _read(lambda leaves: sums(form.unflatten(leaves), *arrays), leaves)
    floats = [x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    sent = [_narrowed(leaves[place], jnp.result_type(*floats)) for place in read]

    def own(sent: list[Array], *arrays: Array) -> T:
        known = list(leaves)  # those that are not read stay where they are
        for place, leaf in zip(read, sent, strict=True):
            known[place] = leaf.astype(leaves[place].dtype)
        found = _scanned(functools.partial(sums, form.unflatten(known)), arrays, fillers, chunk)
        return jax.tree.map(lambda x: x[None], found)

    def lies(shape: jax.ShapeDtypeStruct) -> PartitionSpec:
        """Sums of devices stand beside each other along a first axis."""
        if shape.ndim:
            return PartitionSpec(tokens or None, rows or None)
        return PartitionSpec(rows + tokens)

    part = PartitionSpec(rows or None, tokens or None)
    run = jax.shard_map(
        own,
        in_specs=(PartitionSpec(), *[part] * len(arrays)),
        out_specs=jax.tree.map(lies, shapes),
        axis_names={*rows, *tokens},
        check_vma=False,
    )
    return jax.tree.map(lambda x: x.sum(0), run(sent, *arrays))


def _divided_over(x: Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the current mesh that rows and tokens of [B, L, ...] are divided over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return (), ()
    spec = (*spec_for(("batch", "seq"), x.shape[:2], mesh), None, None)
    rows, tokens = ((each,) if isinstance(each, str) else tuple(each or ()) for each in spec[:2])
    return rows, tokens


def _read(function: Callable[[list[Array]], T], leaves: list[Array]) -> tuple[list[int], T]:
    """The places of the leaves that a function reads, and the shapes of what it returns."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(leaves)
    used = {v for eqn in program.jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
    return [place for place, var in enumerate(program.jaxpr.invars) if var in used], shapes


def _narrowed(leaf: Array, dtype: Any) -> Array:
    """A kernel in the dtype that `contract` multiplies it in, if that is narrower."""
    wide = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > dtype.itemsize
    return leaf.astype(dtype) if wide and leaf.ndim > 1 else leaf


def _scanned(
    sums: Callable[..., T], arrays: Sequence[Array], fillers: Sequence[int], chunk: int
) -> T:
    """`sums(*arrays)` in chunks, as `in_chunks` wants them.

    The tokens of a chunk are spread over the sequence, so that devices that share it, where they
    are not told apart, have work in every chunk.
    """
    length = arrays[0].shape[1]
    if chunk >= length:
        return sums(*arrays)
    count = -(-length // chunk)
    surplus = count * chunk - length

    def cut(x: Array, filler: int) -> Array:
        x = jnp.pad(x, [(0, surplus * (i == 1)) for i in range(x.ndim)], constant_values=filler)
        x = x.reshape(x.shape[0], chunk, count, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)  # [count, B, chunk, ...]

    parts = tuple(map(cut, arrays, fillers))

    def add(total: T, part: Any) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*part)), None

    shapes = jax.eval_shape(sums, *(part[0] for part in parts))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, nothing, parts)[0]
