"""The mechanism that every tower and decoder runs on: a plan of steps, executed as scanned
segments.

The parameter leaves of all steps of a plan (`zoo.models.parts.layers.plan`) are stored stacked: a
leaf has one row for every step that owns it, so that replacing a part of some layers leaves no dead
rows, and a policy never changes the names or the shapes of the weights of the block.

The steps are covered by segments (start, period, repeats); a segment traces `period` steps and
scans them `repeats` times. The same numbers come out scanned or unrolled.

Layer states (key-value caches and others) are kept in the layout of the segments: a tuple over
segments, which for a single step holds its state, and for scanned steps a tuple over the period of
pytrees stacked over the repeats. In decoding they are carried through the scan and updated in
place.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.names import shard
from zoo.models.core.tree import Path, flatten_dict, unflatten_dict
from zoo.models.core.types import Array, Aux, Memory, Stream
from zoo.models.parts.layers.plan import (
    SCAN_FROM,
    Segment,
    State,
    Step,
    cover,
    flatten_boxed,
    is_shared,
    names_of,
    owners_of,
)

Remat = Literal["none", "dots", "offload", "full"]
"""What a layer keeps for its gradient: everything, the results of its linear maps, these in the
memory of the host, or nothing but its input. What is not kept is computed twice.
"""


class Stack(nn.Module):
    """Runs a plan. The only owner of scanned layers.

    Parameters are `{stack name: {leaf path: [rows, …]}}`, the first axis named "layers". For
    inference on a CPU, where cutting a row out of a leaf copies it, `unstack` turns every leaf into
    a tuple of its rows; the steps are then unrolled.

    Attributes:
      steps: the plan.
      scan: whether repeated steps are scanned (one trace per period) or unrolled.
      remat: what each step keeps for the gradient.
    """

    steps: tuple[Step, ...]
    scan: bool = True
    remat: Remat = "none"

    def setup(self) -> None:
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat = {self.remat!r}: want one of {', '.join(get_args(Remat))}")
        # What is there is taken as it is: `self.param` would trace the initialiser to check it.
        self.tree = {
            name: self.get_variable("params", name)
            if self.has_variable("params", name)
            else self.param(name, self._init, name)
            for name in dict.fromkeys(step.stack for step in self.steps)
        }

    def __call__(
        self,
        stream: Stream,
        states: Any = None,
        memory: Memory | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Stream, Any, tuple[Aux, ...]]:
        """Run the steps from `start` to before `stop`; by default all.

        Args:
          stream: input.
          states: None in training; `Reserve(n)` to build caches with room for n more tokens; or
            what an earlier call with the same `start` and `stop` returned.
          memory: read-only arrays per example.
          start: first step.
          stop: one past the last step.

        Returns:
          The stream, the new states (None in training), and one aux per step.
        """
        stop = len(self.steps) if stop is None else stop
        if not 0 <= start <= stop <= len(self.steps):
            raise ValueError(f"steps {start} to {stop}: the plan has {len(self.steps)}")
        rows = _Rows(self.steps, nn.unbox(self.tree))
        segments = self._segments(start, stop, rows.unstacked)
        carried = states if isinstance(states, tuple) else (states,) * len(segments)
        if len(carried) != len(segments):
            raise ValueError(f"states: got {len(carried)} segments, want {len(segments)}")
        if states is None:
            rows.cut(segments)
        out_states, aux = [], []
        for segment, state in zip(segments, carried, strict=True):
            run = self._one if segment[1:] == (1, 1) else self._scanned
            stream, state, reports = run(segment, rows, stream, state, memory or {})
            out_states.append(state)
            aux.extend(reports)
        return stream, (None if states is None else tuple(out_states)), tuple(aux)

    def layer(self, index: int) -> nn.Module:
        """The block of step `index` with its weights, for whoever reads its projections. Every leaf
        of its parameter stack has a row for each step.
        """
        step = self.steps[index]
        rows = nn.unbox(self.variables["params"][step.stack])
        own = jax.tree.map(lambda leaf: leaf[index], rows, is_leaf=lambda x: isinstance(x, tuple))
        return step.block.clone(parent=None, name=None).bind({"params": own})

    def _segments(self, start: int, stop: int, unstacked: bool) -> tuple[Segment, ...]:
        """Segments of single steps (step, 1, 1), and those that are worth a scan."""
        found: list[Segment] = []
        covered = cover(tuple(step.kind for step in self.steps[start:stop]))
        for first, period, repeats in covered:
            unit = self.steps[start + first : start + first + period]
            fixed = not any(policy.reshapes for step in unit for policy in step.policies)
            if self.scan and fixed and not unstacked and repeats >= SCAN_FROM:
                found.append((start + first, period, repeats))
            else:
                found += [(start + first + i, 1, 1) for i in range(period * repeats)]
        return tuple(found)

    def _init(self, key: Array, stack: str) -> dict[str, Any]:
        """Boxed parameters of one stack; steps of equal kind are initialised by one vmap."""
        groups: dict[Hashable, list[int]] = {}
        for i, step in enumerate(self.steps):
            if step.stack == stack:
                groups.setdefault(step.kind, []).append(i)
        parts: dict[Path, list[tuple[list[int], Any]]] = {}
        for members in groups.values():
            keys = jnp.stack([jax.random.fold_in(key, i) for i in members])
            tree = jax.vmap(self.steps[members[0]].init)(keys)
            for path, leaf in flatten_boxed(tree).items():
                parts.setdefault((stack, *path), []).append((members, leaf))
        out = {}
        for path, owners in owners_of(self.steps).items():
            if path[0] != stack:
                continue
            values = [nn.unbox(leaf) for _, leaf in parts[path]]
            order = [i for members, _ in parts[path] for i in members]
            kept = owners[:1] if is_shared(self.steps, path) else owners
            rows = jnp.concatenate(values)[jnp.array([order.index(i) for i in kept])]
            first = parts[path][0][1]
            if not isinstance(first, nn.LogicallyPartitioned):
                first = nn.LogicallyPartitioned(first, (None,) * (rows.ndim - 1))
            out[path[1:]] = first.replace(value=rows, names=("layers", *first.names))
        return unflatten_dict(out)

    def _one(
        self, segment: Segment, rows: "_Rows", stream: Stream, state: State, memory: Memory
    ) -> tuple[Stream, State, list[Aux]]:
        """Run a single step; its state is as the layer keeps it."""
        step = self.steps[segment[0]]
        policies = jax.tree.map(jnp.asarray, step.policies)
        params = rows.of(segment, 0, 0, {})
        run = _remembering(step, state, self.remat, scanned=False)
        stream, state, aux = run(params, policies, stream, state, memory)
        return stream, state, [aux]

    def _scanned(
        self, segment: Segment, rows: "_Rows", stream: Stream, states: Any, memory: Memory
    ) -> tuple[Stream, Any, list[Aux]]:
        """Scan a segment; its states are a tuple over the period of trees stacked over repeats."""
        start, period, repeats = segment
        unit = self.steps[start : start + period]
        data = tuple(
            jax.tree.map(
                lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]),
                *[self.steps[start + j * period + offset].policies for j in range(repeats)],
            )
            for offset in range(period)
        )
        carries_state = isinstance(states, tuple)

        def body(carry: tuple[Stream, Any], xs: tuple) -> tuple[tuple[Stream, Any], tuple]:
            stream, cached = carry
            j, unit_rows, policies = xs
            fresh, reports = [], []
            for offset, step in enumerate(unit):
                state = states
                if carries_state:
                    state = jax.tree.map(functools.partial(_row, at=j), cached[offset])
                params = rows.of(segment, offset, j, unit_rows)
                run = _remembering(step, state, self.remat, scanned=True)
                stream, state, aux = run(params, policies[offset], stream, state, memory)
                if carries_state:
                    new = jax.tree.map(
                        lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, j, 0),
                        cached[offset],
                        state,
                    )
                    cached = (*cached[:offset], new, *cached[offset + 1 :])
                else:
                    fresh.append(state)
                reports.append(aux)
            return (stream, cached), (tuple(fresh), tuple(reports))

        carry = (stream, states if carries_state else None)
        xs = (jnp.arange(repeats), rows.per_repeat(segment), data)
        (stream, cached), (fresh, reports) = jax.lax.scan(body, carry, xs)
        aux = [jax.tree.map(lambda x, j=j: x[j], each) for j in range(repeats) for each in reports]
        return stream, (cached if carries_state else fresh), aux


def _remembering(step: Step, state: State, remat: Remat, *, scanned: bool) -> Callable[..., Any]:
    """`step.run`, which in training keeps for the gradient what `remat` says."""
    if remat == "none" or state is not None:
        return step.run
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
        "full": None,
    }[remat]
    # In a scan nothing can be merged with the second computation anyway.
    return jax.checkpoint(step.run, policy=policy, prevent_cse=not scanned)


class _Rows:
    """Finds the rows of each step in the leaves of a stack.

    Rows are indexed in place in inference: a cut copies the weights once. Where gradients may flow,
    `cut` splits every leaf once, because the transpose of a split is one concatenation.
    """

    def __init__(self, steps: tuple[Step, ...], tree: dict[str, Any]):
        self._steps = steps
        self._owners = owners_of(steps)
        self._names: dict[Path, tuple[str | None, ...]] = {}
        self._leaves = flatten_dict(tree)
        self._pieces: dict[Path, dict[int, Any]] | None = None
        self.unstacked = any(isinstance(leaf, tuple) for leaf in self._leaves.values())

    def cut(self, segments: Sequence[Segment]) -> None:
        """Cut every leaf into the rows of each of the segments, which follow one another."""
        self._pieces, self._names = {}, names_of(self._steps)
        if self.unstacked or not segments:
            return
        ends = [(start, start + period * repeats) for start, period, repeats in segments]
        spans = [(0, ends[0][0]), *ends, (ends[-1][1], len(self._steps))]
        for path, leaf in self._leaves.items():
            if not is_shared(self._steps, path):
                sizes = [sum(a <= owner < b for owner in self._owners[path]) for a, b in spans]
                pieces = _split(leaf, sizes)[1:-1]
                self._pieces[path] = {a: piece for (a, _), piece in zip(ends, pieces, strict=True)}

    def per_repeat(self, segment: Segment) -> dict[Path, Any]:
        """Cut rows of a scanned segment: for each row of a unit a leaf [repeats, …]; nothing if not
        cut.

        The scan hands a step the rows that it computes with, as they are: what is computed from
        them within the scan, were it a reshape, would be stacked and kept for the gradient, which
        makes a second copy of the weights.
        """
        start, period, repeats = segment
        found = {}
        for path, pieces in (self._pieces or {}).items():
            if width := self._count(path, start, start + period):
                found[path] = _by_rank(pieces[start], repeats, width)
        return found

    def of(
        self, segment: Segment, offset: int, j: Array | int, unit_rows: dict[Path, Any]
    ) -> dict[str, Any]:
        """The parameters of step `offset` of the unit in its repeat `j`."""
        start, period, repeats = segment
        found = {}
        for path, owners in self._owners.items():
            if start + offset not in owners:
                continue
            leaf, before = self._leaves[path], self._count(path, 0, start)
            rank = owners.index(start + offset) - before
            if is_shared(self._steps, path):
                row = _at(leaf, 0)
            elif path in unit_rows:
                row = _at(unit_rows[path], rank)
            elif self._pieces and path in self._pieces:
                row = _at(self._pieces[path][start], rank)
            elif repeats == 1:
                row = _at(leaf, before + rank)
            else:
                at = before + j * self._count(path, start, start + period) + rank
                row = jax.tree.map(functools.partial(_row, at=at), leaf)
            if self._pieces is not None and isinstance(row, jax.Array):
                row = _shard_gradient(row, self._names[path])
            found[path[1:]] = row
        return unflatten_dict(found)

    def _count(self, path: Path, start: int, stop: int) -> int:
        return sum(start <= owner < stop for owner in self._owners[path])


def unstack(params: Any, names: Any) -> Any:
    """Parameters with every stacked leaf as a tuple of its rows, for inference on a CPU.

    Args:
      params: unboxed parameters of a model.
      names: their logical axis names (`zoo.models.core.names.tree_names`).
    """

    def rows(axes: tuple[str | None, ...], leaf: Any) -> Any:
        if not axes or axes[0] != "layers":
            return leaf
        each, shape = jax.tree.flatten(leaf)
        return tuple(map(shape.unflatten, zip(*each, strict=True)))

    return jax.tree.map(rows, names, params, is_leaf=lambda axes: isinstance(axes, tuple))


def restack(params: Any) -> Any:
    """The inverse of `unstack`."""

    def stacked(leaf: Any) -> Any:
        if not isinstance(leaf, tuple):
            return leaf
        return jax.tree.map(lambda *rows: jnp.stack(rows), *leaf)

    return jax.tree.map(stacked, params, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _at(leaf: Any, row: int) -> Any:
    """A row of a stacked leaf: an array, an operand, or a tuple of its rows."""
    return leaf[row] if isinstance(leaf, tuple) else jax.tree.map(lambda x: x[row], leaf)


def _by_rank(rows: Any, repeats: int, width: int) -> tuple[Any, ...]:
    """Rows [repeats width, …] of a leaf as `width` leaves [repeats, …], those of each rank."""
    if width == 1:
        return (rows,)
    units = jax.tree.map(lambda x: x.reshape(repeats, width, *x.shape[1:]), rows)
    return tuple(
        jax.tree.map(lambda x: x.squeeze(1), piece) for piece in _split(units, [1] * width, 1)
    )


def _split(leaf: Any, sizes: Sequence[int], axis: int = 0) -> list[Any]:
    """The rows of a stacked leaf, or of all leaves of an operand, in pieces."""
    leaves, shape = jax.tree.flatten(leaf)
    pieces = [jax.lax.split(each, sizes, axis) for each in leaves]
    return [shape.unflatten(piece) for piece in zip(*pieces, strict=True)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _shard_gradient(row: Array, names: tuple[str | None, ...]) -> Array:
    """The row itself, whose gradient each device sums in the part that it keeps, and in no other.

    A constraint on the row would do the same, and make it another array, kept for the gradient.
    """
    del names
    return row


@_shard_gradient.defjvp
def _shard_tangent(
    names: tuple[str | None, ...], rows: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return rows[0], shard(tangents[0], *names)


def _row(leaf: Array, at: Array | int) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, at, 0, keepdims=False)
