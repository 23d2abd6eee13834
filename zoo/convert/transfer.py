"""The parameters of one model as those of another that shares most of its parts; running statistics
are among them, below `stats`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from zoo.convert.place import abstract_variables, cast_to, flat_paths, is_stats, together
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import Piece

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Transfer:
    """What becomes of the parameters of one model in another.

    Attributes:
      config: of the other model.
      boxed: shapes of its parameters, with the logical names of their axes.
      new: paths that the first model has nothing for.
      unused: paths of the first model that the other has no place for.
    """

    config: ModelConfig
    boxed: Any
    new: frozenset[str]
    unused: frozenset[str]

    def carried(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Those of the first model's parameters that the other has."""
        for piece in pieces:
            kept = {path: leaf for path, leaf in piece.leaves.items() if path not in self.unused}
            if len(kept) == len(piece.leaves):
                yield piece
            elif kept:
                yield dataclasses.replace(piece, leaves=kept, read=partial(_some, piece, kept))

    def fresh(
        self, seed: int, shardings: Mapping[str, Sharding], dtype: np.dtype | None
    ) -> dict[str, jax.Array]:
        """{path: parameter} of all that is new, as the module's own initialisation makes it, each
        made where it belongs. What else the initialisation would make is not computed.
        """
        if not self.new:
            return {}
        model, inputs = self.config.build(), self.config.inputs(1)

        def init(key: jax.Array) -> dict[str, jax.Array]:
            batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in inputs.items()}
            drawn = nn.unbox(model.init(key, batch))
            made = flat_paths(together(drawn["params"], drawn.get("stats", {})))
            return {
                path: made[path] if is_stats(path) else _cast(made[path], dtype)
                for path in self.new
            }

        where = {path: shardings[path] for path in self.new}
        return jax.jit(init, out_shardings=where)(jax.random.key(seed))


def plan_transfer(old: ModelConfig, new: ModelConfig, source: str | Path) -> Transfer:
    """Find out which parameters of a model `old` a model `new` can take.

    New parameters may come from other `policies`, from those of another `reducer`, and from parts
    (fields of the configuration) whose class is another one, and no subclass; such a part takes
    over nothing.

    Args:
      old: the configuration of the parameters that there are.
      new: the configuration of the model that they are for.
      source: where the parameters are from, for error messages.

    Raises:
      UsageError: they differ in any other way, listing how.
    """
    boxed = abstract_variables(new)
    have, want = _shapes(abstract_variables(old)), _shapes(boxed)
    replaced = tuple(
        f"{field.name}/"
        for field in dataclasses.fields(new)
        if not _akin(getattr(new, field.name), getattr(old, field.name, None))
    )
    plain = want
    adding = {
        name: getattr(old, name)
        for name in ("policies", "reducer")
        if hasattr(new, name) and hasattr(old, name) and getattr(new, name) != getattr(old, name)
    }
    if adding and have != want:
        plain = _shapes(abstract_variables(dataclasses.replace(new, **adding)))
    _check(have, plain, replaced, source)
    _check({path: plain.get(path, want[path]) for path in want}, want, replaced, source)
    outside = {path for path in have.keys() & want.keys() if not path.startswith(replaced)}
    return Transfer(new, boxed, frozenset(want.keys() - outside), frozenset(have.keys() - outside))


def _cast(leaf: jax.Array, dtype: np.dtype | None) -> jax.Array:
    return leaf.astype(cast_to(leaf.dtype, dtype))


def _akin(new: Any, old: Any) -> bool:
    """Whether two values of a field are of one class, or one of a subclass of the other's."""
    return isinstance(new, type(old)) or isinstance(old, type(new))


def _shapes(boxed: Any) -> Shapes:
    return {path: leaf.shape for path, leaf in flat_paths(nn.unbox(boxed)).items()}


def _check(have: Shapes, want: Shapes, replaced: tuple[str, ...], source: str | Path) -> None:
    """Raise UsageError if shapes differ outside of the parts that are replaced."""
    problems = [
        f"  {path} is {_shape(have, path)} in the checkpoint, want {_shape(want, path)}"
        for path in sorted(have.keys() | want.keys())
        if have.get(path) != want.get(path) and not path.startswith(replaced)
    ]
    if problems:
        listed = "\n".join(problems)
        raise UsageError(
            f"{source} does not fit the model with these settings; a policy may add parameters and "
            f"a part of another class replace some, but not so:\n{listed}"
        )


def _shape(shapes: Shapes, path: str) -> str:
    return str(shapes[path]) if path in shapes else "absent"


def _some(piece: Piece, paths: Iterable[str]) -> dict[str, np.ndarray]:
    read = piece.read()
    return {path: read[path] for path in paths}
