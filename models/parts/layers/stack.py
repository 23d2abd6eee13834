"""The mechanism that every tower and decoder runs on: a plan of steps, executed as scanned
segments.

A plan is a tuple of `Step`s. Each names a block (the layer itself), the policies wrapped around it,
and the parameter stack that its weights live in. The parameter leaves of all steps are stored
stacked: a leaf has one row for every step that owns it, so that replacing a part of some layers
leaves no dead rows, and a policy never changes the names or the shapes of the weights of the block.

The steps are covered by segments (start, period, repeats); a segment traces `period` steps and
scans them `repeats` times. The same numbers come out scanned or unrolled.

Layer states (key-value caches and others) are kept in the layout of the segments: a tuple over
segments of tuples over the period of pytrees stacked over the repeats. In decoding they are carried
through the scan and updated in place.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.tree import Path, flatten_dict, unflatten_dict
from zoo.models.core.types import Array, Aux, Memory, Stream, Tokens

_SCAN_FROM = 5
"""Fewer repeats are unrolled, which compiles as fast and need not stack what the gradient reads.
"""

State = Any
Run = Callable[[Stream, State], tuple[Stream, State, Aux]]
Segment = tuple[int, int, int]


@struct.dataclass
class LayerPolicy:
    """What happens around a layer: gather, run and scatter, add before, shorten the stream.

    Static fields decide the segment; the other fields are numbers that may differ per layer and are
    scanned. A policy that changes only vision tokens is the identity when `stream.slots` is 0.

    Attributes:
      name: under which its own weights live, beside those of the block.
      shared: its weights have one row, which all of its layers use.
      splits: it runs the halves of the layer itself instead of calling `run`; only the innermost
        may.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def module(self, block: nn.Module) -> nn.Module | None:
        """The policy's own module, made with `parent=None` and initialised on a hidden [1, 2, D];
        or None.
        """
        del block
        return None

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: State,
        memory: Memory,
    ) -> tuple[Stream, State, Aux]:
        """Run one layer.

        Args:
          layer: the bound block, for policies that need its halves or projections.
          own: the bound module of this policy.
          run: the layer with the inner policies.
          stream: input.
          state: the layer's state, `Reserve`, or None in training.
          memory: read-only arrays per example.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Step:
    """One step of a plan. `policies` are ordered from the outermost to the innermost."""

    block: nn.Module
    policies: tuple[LayerPolicy, ...] = ()
    stack: str = "layers"

    def __post_init__(self) -> None:
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"policies {names}: the same policy twice around one layer")
        if any(policy.splits for policy in self.policies[:-1]):
            raise ValueError(
                f"policies {names}: one that splits the layer into halves must be innermost "
                "(last), because those inside it would not be run"
            )

    @property
    def kind(self) -> Hashable:
        """Steps of equal kind run the same code and differ in weights and scanned numbers only."""
        policies = tuple((type(p), jax.tree.structure(p)) for p in self.policies)
        return (self.stack, self.block, policies)

    def init(self, key: Array) -> dict[str, Any]:
        """Boxed parameters: the block's leaves and {policy name: the policy's leaves}."""
        hidden = jnp.zeros((1, 2, self.block.width))
        stream = Stream(hidden, Tokens.sequence(jnp.ones((1, 2), bool)))
        block = _detached(self.block)
        params = dict(block.init(key, stream, method="probe").get("params", {}))
        for number, policy in enumerate(self.policies):
            if (module := _detached(policy.module(self.block))) is not None:
                if policy.name in params:
                    raise ValueError(
                        f"policy {policy.name!r}: the block has a part of the same name"
                    )
                params[policy.name] = module.init(jax.random.fold_in(key, number), hidden)["params"]
        return params

    def run(
        self,
        params: dict[str, Any],
        policies: tuple[LayerPolicy, ...],
        stream: Stream,
        state: State,
        memory: Memory,
    ) -> tuple[Stream, State, Aux]:
        """The layer inside its policies;

        `policies` are this step's, with their numbers as arrays.
        """
        own = {p.name for p in self.policies}
        layer = _detached(self.block).bind(
            {"params": {k: v for k, v in params.items() if k not in own}}
        )

        def call(stream: Stream, state: State) -> tuple[Stream, State, Aux]:
            return layer(stream, state, memory)

        for policy in reversed(policies):
            module = _detached(policy.module(self.block))
            bound = None if module is None else module.bind({"params": params[policy.name]})
            call = functools.partial(_wrapped, policy, layer, bound, call, memory)
        return call(stream, state)


def _detached(module: nn.Module | None) -> nn.Module | None:
    """The module on its own: what another module's method makes, that module adopts."""
    return None if module is None else module.clone(parent=None, name=None)


def _wrapped(
    policy: LayerPolicy,
    layer: nn.Module,
    own: nn.Module | None,
    inner: Run,
    memory: Memory,
    stream: Stream,
    state: State,
) -> tuple[Stream, State, Aux]:
    """`policy` around `inner`; the aux of both, an outer name winning."""
    inner_aux: Aux = {}

    def run(stream: Stream, state: State) -> tuple[Stream, State, Aux]:
        stream, state, aux = inner(stream, state)
        inner_aux.update(aux)
        return stream, state, aux

    stream, state, aux = policy(layer, own, run, stream, state, memory)
    return stream, state, {**inner_aux, **aux}


@functools.lru_cache(maxsize=1024)
def cover(kinds: tuple[Hashable, ...]) -> tuple[Segment, ...]:
    """Cover steps of these kinds with segments (start, period, repeats) so that the fewest are
    traced.
    """
    n = len(kinds)
    best: dict[int, tuple[int, tuple[Segment, ...]]] = {n: (0, ())}
    for start in range(n - 1, -1, -1):
        options = []
        for period in range(1, n - start + 1):
            unit = kinds[start : start + period]
            repeats, stop = 1, start + period
            while True:
                traced, rest = best[stop]
                options.append((traced + period, ((start, period, repeats), *rest)))
                if stop + period > n or kinds[stop : stop + period] != unit:
                    break
                repeats, stop = repeats + 1, stop + period
        best[start] = min(options, key=lambda option: (option[0], len(option[1])))
    return best[0][1]


class Stack(nn.Module):
    """Runs a plan. The only owner of scanned layers.

    Parameters are `{stack name: {leaf path: [rows, …]}}`, the first axis named "layers".

    Attributes:
      steps: the plan.
      scan: whether repeated steps are scanned (one trace per period) or unrolled.
    """

    steps: tuple[Step, ...]
    scan: bool = True

    def setup(self) -> None:
        self.tree = {name: self.param(name, self._init, name) for name in self._stacks()}

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
        segments = self._segments(start, stop)
        carried = states if isinstance(states, tuple) else (states,) * len(segments)
        if len(carried) != len(segments):
            raise ValueError(f"states: got {len(carried)} segments, want {len(segments)}")
        # Rows are cut with one split per leaf where gradients may flow (its transpose is one
        # concatenation) and indexed in place where a state says that this is inference: a cut
        # copies the weights once.
        leaves = flatten_dict(self.tree)
        indexed = states is not None
        rows = leaves if indexed else self._cut(leaves, segments)
        out_states, aux = [], []
        for segment, state in zip(segments, carried, strict=True):
            stream, state, reports = self._segment(
                segment, rows, indexed, stream, state, memory or {}
            )
            out_states.append(state)
            aux.extend(reports)
        return stream, (None if states is None else tuple(out_states)), tuple(aux)

    # ------------------------------------------------------------------ layout

    def _stacks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(step.stack for step in self.steps))

    def _segments(self, start: int, stop: int) -> tuple[Segment, ...]:
        if not self.scan:
            return tuple((i, 1, 1) for i in range(start, stop))
        found = cover(tuple(step.kind for step in self.steps[start:stop]))
        return tuple((start + first, period, repeats) for first, period, repeats in found)

    def _owners(self) -> dict[Path, tuple[int, ...]]:
        return _owners(self.steps)

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
            for path, leaf in _flatten_boxed(tree).items():
                parts.setdefault((stack, *path), []).append((members, leaf))
        out = {}
        for path, owners in self._owners().items():
            if path[0] != stack:
                continue
            values = [nn.unbox(leaf) for _, leaf in parts[path]]
            order = [i for members, _ in parts[path] for i in members]
            kept = owners[:1] if self._is_shared(path) else owners
            rows = jnp.concatenate(values)[jnp.array([order.index(i) for i in kept])]
            first = parts[path][0][1]
            names = (
                first.names
                if isinstance(first, nn.LogicallyPartitioned)
                else (None,) * (rows.ndim - 1)
            )
            out[path[1:]] = nn.LogicallyPartitioned(rows, ("layers", *names))
        return unflatten_dict(out)

    def _cut(
        self, leaves: dict[Path, Array], segments: Sequence[Segment]
    ) -> dict[Path, dict[int, Array]]:
        """{path: {segment start: the segment's rows}}, by one split per leaf."""
        owners = self._owners()
        cut: dict[Path, dict[int, Array]] = {}
        for path, leaf in leaves.items():
            if self._is_shared(path):
                cut[path] = {start: leaf for start, _, _ in segments}
                continue
            ends = [(start, start + period * repeats) for start, period, repeats in segments]
            spans = [(0, segments[0][0]), *ends, (ends[-1][1], len(self.steps))]
            sizes = [sum(a <= owner < b for owner in owners[path]) for a, b in spans]
            pieces = jax.lax.split(leaf, sizes)[1:-1]
            cut[path] = {a: piece for (a, _), piece in zip(ends, pieces, strict=True)}
        return cut

    def _is_shared(self, path: Path) -> bool:
        return any(p.shared and p.name == path[1] for step in self.steps for p in step.policies)

    # ------------------------------------------------------------------ execution

    def _segment(
        self,
        segment: Segment,
        rows: dict,
        indexed: bool,
        stream: Stream,
        states: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, list[Aux]]:
        """Run one segment; returns its stacked states and an aux per step."""
        start, period, repeats = segment
        unit = self.steps[start : start + period]
        owners = self._owners()
        # Where in the leaf each step of the unit finds its row, and how many rows one unit takes.
        first = {path: sum(o < start for o in own) for path, own in owners.items()}
        width = {
            path: sum(start <= o < start + period for o in own) for path, own in owners.items()
        }
        data = tuple(
            jax.tree.map(
                lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]),
                *[self.steps[start + j * period + offset].policies for j in range(repeats)],
            )
            for offset in range(period)
        )
        sliced: dict[Path, Array] = {}
        if not indexed:
            for path, pieces in rows.items():
                if width[path] and not self._is_shared(path):
                    piece = pieces[start]
                    sliced[path] = piece.reshape(repeats, width[path], *piece.shape[1:])

        def parameters(offset: int, j: Array, unit_rows: dict[Path, Array]) -> dict[str, Any]:
            found = {}
            for path, own in owners.items():
                if start + offset not in own:
                    continue
                rank = own.index(start + offset) - first[path]
                if self._is_shared(path):
                    found[path[1:]] = (rows[path] if indexed else rows[path][start])[0]
                elif indexed:
                    at = first[path] + j * width[path] + rank
                    found[path[1:]] = jax.lax.dynamic_index_in_dim(
                        rows[path], at, 0, keepdims=False
                    )
                else:
                    found[path[1:]] = unit_rows[path][rank]
            return unflatten_dict(found)

        carries_state = isinstance(states, tuple)

        def body(carry: tuple[Stream, Any], xs: tuple) -> tuple[tuple[Stream, Any], tuple]:
            stream, cached = carry
            j, unit_rows, policies = xs
            fresh, reports = [], []
            for offset, step in enumerate(unit):
                state = states
                if carries_state:
                    state = jax.tree.map(
                        lambda x: jax.lax.dynamic_index_in_dim(x, j, 0, keepdims=False),
                        cached[offset],
                    )
                params = parameters(offset, j, unit_rows)
                stream, state, aux = step.run(params, policies[offset], stream, state, memory)
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
        xs = (jnp.arange(repeats), sliced, data)
        if repeats < _SCAN_FROM:
            parts = []
            for j in range(repeats):
                carry, part = body(carry, jax.tree.map(lambda x, j=j: x[j], xs))
                parts.append(part)
            ys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        else:
            carry, ys = jax.lax.scan(body, carry, xs)
        stream, cached = carry
        fresh, reports = ys
        aux = [
            jax.tree.map(lambda x, j=j: x[j], report) for j in range(repeats) for report in reports
        ]
        return stream, (cached if carries_state else fresh), aux


@functools.lru_cache(maxsize=256)
def _owners(steps: tuple[Step, ...]) -> dict[Path, tuple[int, ...]]:
    """{leaf path with its stack: the steps that own it}.

    Raises:
      ValueError: if two steps give one path different shapes.
    """
    owners: dict[Path, list[int]] = {}
    shapes: dict[Path, tuple[int, ...]] = {}
    by_kind: dict[Hashable, dict[Path, Any]] = {}
    for i, step in enumerate(steps):
        if step.kind not in by_kind:
            by_kind[step.kind] = _flatten_boxed(jax.eval_shape(step.init, jax.random.key(0)))
        for sub, leaf in by_kind[step.kind].items():
            path, shape = (step.stack, *sub), nn.unbox(leaf).shape
            if shapes.setdefault(path, shape) != shape:
                raise ValueError(f"{'/'.join(path)}: steps disagree, {shapes[path]} and {shape}")
            owners.setdefault(path, []).append(i)
    return {path: tuple(steps) for path, steps in owners.items()}


def _flatten_boxed(tree: Any) -> dict[Path, Any]:
    return flatten_dict(tree, is_leaf=lambda _, leaf: isinstance(leaf, nn.LogicallyPartitioned))


def layers(block: nn.Module, depth: int, policies: Sequence[LayerPolicy] = ()) -> tuple[Step, ...]:
    """The plan of a plain transformer:

    `depth` times the same block, all inside the same policies.
    """
    return (Step(block, tuple(policies)),) * depth
