"""Stages of equal blocks that are no stream of tokens: feature maps, windows, cells of a grid.

As in `Stack`, leaves are stored stacked, [depth, ...], so that many blocks compile as quickly as
one; unlike it, a block is any module, may keep statistics and draw random numbers, and has no state
and no policies.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.types import Array
from zoo.models.parts.layers.plan import SCAN_FROM

BLOCKS = "layers"
"""The name below which the leaves of all blocks stand, in every collection."""


class Repeat(nn.Module):
    """`block(x, *args, train=train, **numbers of this block)`, `depth` times.

    Leaves are called `<name of the Repeat>/layers/<path in the block>` in `params` and in `stats`,
    so that a key table has `Row(path, "...{}...", transform, steps=range(depth))` for each.

    Attributes:
      blocks: the block, made with `parent=None`; or several that differ in static settings only and
        take turns, such as plain and shifted windows: all have the same leaves.
      depth: how many times.
    """

    blocks: nn.Module | tuple[nn.Module, ...]
    depth: int

    @nn.compact
    def __call__(
        self,
        x: Any,
        *args: Any,
        train: bool = False,
        each: Mapping[str, Array | None] | None = None,
    ) -> Any:
        """Run all blocks.

        Args:
          x: what the first block takes, and each one returns: an array, or a tree of arrays of the
            same shapes.
          *args: read by every block.
          train: told to every block. Blocks may then draw from the random stream "dropout".
          each: {name: numbers [depth, ...]}, one row for each block, given to it under that name;
            None stays None.
        """
        blocks = self.blocks if isinstance(self.blocks, tuple) else (self.blocks,)
        unit = tuple(block.clone(parent=None, name=None) for block in blocks)
        numbers = {name: None if v is None else jnp.asarray(v) for name, v in (each or {}).items()}

        def first(key: Array) -> dict[str, Any]:
            """Variables of all blocks, with those of each axis' names."""
            row = jax.tree.map(lambda leaf: leaf[0], numbers)
            drawn = jax.vmap(lambda k: dict(unit[0].init(k, x, *args, train=False, **row)))
            return drawn(jax.random.split(key, self.depth))

        made: dict[str, Any] = {}
        if not self.has_variable("params", BLOCKS):
            made = first(self.make_rng("params"))
            self.param(BLOCKS, lambda _: jax.tree.map(_stacked, made["params"], is_leaf=_is_boxed))
        params = nn.unbox(self.get_variable("params", BLOCKS))
        stats: nn.Variable | None = None
        if "stats" in made or self.has_variable("stats", BLOCKS):
            stats = self.variable("stats", BLOCKS, lambda: nn.unbox(made["stats"]))
        mutable = stats is not None and train and self.is_mutable_collection("stats")
        keys = None
        if train and self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), self.depth)

        def run(block: nn.Module, x: Any, row: Any) -> tuple[Any, Any]:
            params, stats, key, numbers = row
            variables = {"params": params} | ({} if stats is None else {"stats": stats})
            rngs = {} if key is None else {"dropout": key}
            options = {"train": train, "rngs": rngs, **numbers}
            if not mutable:
                return block.apply(variables, x, *args, **options), None
            x, changed = block.apply(variables, x, *args, mutable=["stats"], **options)
            return x, changed["stats"]

        others = (None if stats is None else stats.value, keys, numbers)
        period = len(unit)
        scanned = 0
        if self.depth >= SCAN_FROM * period and not _is_apart(params):
            scanned = self.depth // period * period
        pieces = _cut(params, [scanned] * bool(scanned) + [1] * (self.depth - scanned))
        found = []
        if scanned:

            def body(x: Any, row: Any) -> tuple[Any, Any]:
                changes = []
                for i, block in enumerate(unit):
                    x, changed = run(block, x, jax.tree.map(lambda leaf, i=i: leaf[i], row))
                    changes.append(changed)
                return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *changes)

            rows = (pieces.pop(0), *jax.tree.map(lambda leaf: leaf[:scanned], others))
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), rows)
            x, changed = jax.lax.scan(body, x, rows)
            found.append(jax.tree.map(lambda leaf: leaf.reshape(scanned, *leaf.shape[2:]), changed))
        for i, piece in enumerate(pieces, scanned):
            own = jax.tree.map(lambda leaf: leaf[0], piece)
            rest = jax.tree.map(lambda leaf, i=i: leaf[i], others)
            x, changed = run(unit[i % period], x, (own, *rest))
            found.append(jax.tree.map(lambda leaf: leaf[None], changed))
        if stats is not None and mutable:
            stats.value = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
        return x


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _stacked(leaf: Any) -> nn.LogicallyPartitioned:
    """A leaf with one row for each block, and the name of that axis."""
    if not _is_boxed(leaf):
        return nn.LogicallyPartitioned(leaf, (BLOCKS, *(None,) * (leaf.ndim - 1)))
    return leaf.replace(names=(BLOCKS, *leaf.names))


def _is_apart(params: Any) -> bool:
    """Whether leaves are tuples of their rows, as `stack.unstack` makes them."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return any(isinstance(leaf, tuple) for leaf in leaves)


def _cut(params: Any, sizes: list[int]) -> list[Any]:
    """The rows of all blocks in pieces of so many; the gradient puts them together at once."""
    if _is_apart(params):
        apart = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
        rows = [
            jax.tree.map(lambda leaf, i=i: leaf[i], params, is_leaf=apart)
            for i in range(len(sizes))
        ]
        return jax.tree.map(lambda x: x[None], rows)
    leaves, shape = jax.tree.flatten(params)
    cut = [jax.lax.split(leaf, sizes) for leaf in leaves]
    return [shape.unflatten(piece) for piece in zip(*cut, strict=True)]
