"""Plans: which layers a tower or decoder has, in what policies, and where their weights live.

A plan is a tuple of `Step`s. Each names a block (the layer itself), the policies wrapped around it,
and the parameter stack that its weights live in. `zoo.models.parts.layers.stack` runs plans.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.names import tree_names
from zoo.models.core.tree import Path, flatten_dict
from zoo.models.core.types import Array, Aux, Memory, Stream, Tokens

SCAN_FROM = 5
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
      drops: it removes tokens from the stream for good.
      reshapes: every one of its layers changes how many tokens there are, so that they are not
        scanned.
      reads: names of the memory that it reads, which has something for every vision token.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    reshapes: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()

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
        splitting = [policy.name for policy in self.policies if policy.splits]
        if len(splitting) > 1:
            raise ValueError(
                f"policies {names}: {' and '.join(splitting)} split the layer into halves, which "
                "one policy at most can do; choose one of them, or give them different layers"
            )
        if splitting and splitting != names[-1:]:
            raise ValueError(
                f"policies {names}, from the outermost to the innermost: {splitting[0]} splits the "
                "layer into halves and so must be innermost, because what is inside of it would "
                "not be run; of a model's `policies` it must come first"
            )

    @property
    def kind(self) -> tuple[str, Hashable, Hashable]:
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
                own = period if repeats >= SCAN_FROM else period * repeats
                options.append((traced + own, ((start, period, repeats), *rest)))
                if stop + period > n or kinds[stop : stop + period] != unit:
                    break
                repeats, stop = repeats + 1, stop + period
        best[start] = min(options, key=lambda option: (option[0], len(option[1])))
    return best[0][1]


@functools.lru_cache(maxsize=256)
def owners_of(steps: tuple[Step, ...]) -> dict[Path, tuple[int, ...]]:
    """{leaf path with its stack: the steps that own it}.

    Raises:
      ValueError: if two steps give one path different shapes.
    """
    owners: dict[Path, list[int]] = {}
    shapes: dict[Path, tuple[int, ...]] = {}
    by_kind = _leaves_by_kind(steps)
    for i, step in enumerate(steps):
        for sub, leaf in by_kind[step.kind].items():
            path, shape = (step.stack, *sub), nn.unbox(leaf).shape
            if shapes.setdefault(path, shape) != shape:
                raise ValueError(f"{'/'.join(path)}: steps disagree, {shapes[path]} and {shape}")
            owners.setdefault(path, []).append(i)
    return {path: tuple(steps) for path, steps in owners.items()}


def names_of(steps: tuple[Step, ...]) -> dict[Path, tuple[str | None, ...]]:
    """{leaf path with its stack: the logical names of the axes of one row}."""
    return {
        (kind[0], *sub): tree_names(leaf)
        for kind, leaves in _leaves_by_kind(steps).items()
        for sub, leaf in leaves.items()
    }


@functools.lru_cache(maxsize=256)
def _leaves_by_kind(steps: tuple[Step, ...]) -> dict[tuple[str, Hashable, Hashable], Any]:
    """{kind of step: {leaf path: its boxed shape}}; every kind is traced once."""
    by_kind = {step.kind: step for step in steps}
    key = jax.random.key(0)
    return {kind: flatten_boxed(jax.eval_shape(step.init, key)) for kind, step in by_kind.items()}


def flatten_boxed(tree: Any) -> dict[Path, Any]:
    """`flatten_dict` of a tree of parameters with their axis names."""
    return flatten_dict(tree, is_leaf=lambda _, leaf: isinstance(leaf, nn.LogicallyPartitioned))


def layers(block: nn.Module, depth: int, policies: Sequence[LayerPolicy] = ()) -> tuple[Step, ...]:
    """The plan of a plain transformer:

    `depth` times the same block, all inside the same policies.
    """
    return (Step(block, tuple(policies)),) * depth


def is_shared(steps: tuple[Step, ...], path: Path) -> bool:
    """Whether all layers use one row of the leaf at `path`."""
    return any(p.shared and p.name == path[1] for step in steps for p in step.policies)
