"""Key tables: which tensor of another code's checkpoint is which parameter of ours, in both
directions.

A `Table` is a tuple of rows. Each row ties parameters of ours (paths such as
"stack/layers/q/kernel") to tensors of theirs ("layers.{}.self_attn.q_proj.weight") by a named
transform. A row with `steps` describes stacked parameters: row r of our leaf belongs to the key
with `{}` replaced by `steps[r]`. Conversion is strict both ways: missing, extra and misshapen
tensors raise one error that lists them all.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.models.core.errors import ZooError
from zoo.models.core.tree import flatten_dict, unflatten_dict

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse maps between their tensors and ours.

    Attributes:
      name: for error messages.
      load: (their arrays, shapes of ours) -> our arrays.
      save: our arrays -> their arrays.
    """

    name: str
    load: Callable[[Sequence[np.ndarray], Sequence[Shape]], Sequence[np.ndarray]]
    save: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


same = Transform("same", lambda theirs, _: theirs, lambda ours: ours)
"""The same array."""

flat = Transform("flat", lambda t, s: [t[0].reshape(s[0])], lambda ours: [ours[0].reshape(-1)])
"""Theirs is our array flattened, as biases of attention heads are."""

conv = Transform(
    "conv", lambda t, _: [t[0].transpose(2, 3, 1, 0)], lambda o: [o[0].transpose(3, 2, 0, 1)]
)
"""Their 2-D convolution kernel [out, in, h, w], ours [h, w, in, out]."""


def linear(num_in: int = 1) -> Transform:
    """Their `nn.Linear` weight [out, in]; ours has `num_in` input axes, then output axes."""

    def save(ours: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        rows = int(np.prod(ours[0].shape[:num_in], dtype=np.int64))
        return [ours[0].reshape(rows, -1).T]

    return Transform(f"linear({num_in})", lambda t, s: [t[0].T.reshape(s[0])], save)


def split(parts: int, each: Transform) -> Transform:
    """Their one tensor is `parts` equal pieces along the first axis, each one of ours by `each`."""

    def load(theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        pieces = np.split(theirs[0], parts)
        return [each.load([p], [s])[0] for p, s in zip(pieces, shapes, strict=True)]

    return Transform(
        f"split({parts}, {each.name})",
        load,
        lambda ours: [np.concatenate([each.save([o])[0] for o in ours])],
    )


@dataclass(frozen=True)
class Row:
    """Ties `paths` of ours to `keys` of theirs.

    Attributes:
      paths: one path, or several.
      keys: one key, or several; with `steps`, each has a `{}`.
      transform: between them.
      steps: step number of every row of our stacked leaves; None for leaves that are not stacked.
    """

    paths: str | tuple[str, ...]
    keys: str | tuple[str, ...]
    transform: Transform = same
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that is no parameter of ours: checked on load, written again on save."""

    key: str
    value: Callable[[], np.ndarray]
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Table:
    """The rows of one checkpoint layout."""

    rows: tuple[Row | Constant, ...]

    def __add__(self, other: "Table") -> "Table":
        return Table(self.rows + other.rows)

    def under(self, ours: str = "", theirs: str = "") -> "Table":
        """The same table one level deeper:

        `ours` is a path ("tower"), `theirs` a prefix ("vision_tower.").
        """

        def move(row: Row | Constant) -> Row | Constant:
            if isinstance(row, Constant):
                return dataclasses.replace(row, key=theirs + row.key)
            paths = tuple(f"{ours}/{path}".strip("/") for path in _many(row.paths))
            return dataclasses.replace(
                row, paths=paths, keys=tuple(theirs + k for k in _many(row.keys))
            )

        return Table(tuple(move(row) for row in self.rows))

    def shapes(self, params: Mapping[str, Any]) -> dict[str, Shape]:
        """{their key: shape} of the whole checkpoint, from our parameters or their shapes alone."""
        flat_params = _flatten(params)
        self._check_paths(flat_params)
        out = {}
        for row in self.rows:
            if isinstance(row, Constant):
                out[row.key] = row.value().shape
                continue
            for _, paths, keys in _instances(row):
                ours = [np.broadcast_to(np.int8(0), _row_shape(flat_params[p], row)) for p in paths]
                for key, theirs in zip(keys, row.transform.save(ours), strict=True):
                    out[key] = theirs.shape
        return out

    def load(self, state: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> dict[str, Any]:
        """Our parameters from their state dict.

        Args:
          state: {key: array}.
          params: our parameters or their shapes (`jax.eval_shape`), for the tree to fill.

        Returns:
          A nested dict of NumPy arrays in the dtype of `state`.

        Raises:
          ZooError: listing every missing, extra or misshapen tensor.
        """
        want = self.shapes(params)
        _check_keys(want, state)
        flat_params, out = _flatten(params), {}
        for row in self.rows:
            if isinstance(row, Constant):
                _check_constant(row, state[row.key])
                continue
            for r, paths, keys in _instances(row):
                shapes = [_row_shape(flat_params[p], row) for p in paths]
                found = row.transform.load([np.asarray(state[key]) for key in keys], shapes)
                for path, array in zip(paths, found, strict=True):
                    if row.steps is None:
                        out[path] = np.ascontiguousarray(array)
                        continue
                    if path not in out:
                        out[path] = np.empty((len(row.steps), *array.shape), array.dtype)
                    out[path][r] = array
        return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in out.items()})

    def save(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Their state dict from our parameters."""
        flat_params = _flatten(params)
        self._check_paths(flat_params)
        out = {}
        for row in self.rows:
            if isinstance(row, Constant):
                out[row.key] = row.value()
                continue
            leaves = {path: np.asarray(flat_params[path]) for path in _many(row.paths)}
            for r, paths, keys in _instances(row):
                ours = [leaves[p] if row.steps is None else leaves[p][r] for p in paths]
                for key, theirs in zip(keys, row.transform.save(ours), strict=True):
                    out[key] = np.ascontiguousarray(theirs)
        return out

    def _check_paths(self, flat_params: Mapping[str, Any]) -> None:
        """Every parameter of ours stands in exactly one row, with as many rows as it has steps."""
        named = [path for row in self.rows if isinstance(row, Row) for path in _many(row.paths)]
        twice = sorted({path for path in named if named.count(path) > 1})
        problems = [f"in two rows: {path}" for path in twice]
        problems += [f"no such parameter: {path}" for path in sorted(set(named) - set(flat_params))]
        problems += [f"in no row: {path}" for path in sorted(set(flat_params) - set(named))]
        for row in self.rows:
            if isinstance(row, Row) and row.steps is not None:
                for path in _many(row.paths):
                    rows = flat_params[path].shape[0] if path in flat_params else len(row.steps)
                    if rows != len(row.steps):
                        problems.append(f"{path}: {rows} rows, the table says {len(row.steps)}")
        if problems:
            raise ZooError("the key table does not fit the parameters:\n  " + "\n  ".join(problems))


def _many(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}


def _instances(row: Row) -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """(row number, paths, keys) of every set of tensors that a row ties together."""
    for r, step in enumerate((None,) if row.steps is None else row.steps):
        keys = _many(row.keys)
        yield r, _many(row.paths), keys if step is None else tuple(k.format(step) for k in keys)


def _row_shape(leaf: Any, row: Row) -> Shape:
    return tuple(leaf.shape if row.steps is None else leaf.shape[1:])


def _check_keys(want: Mapping[str, Shape], state: Mapping[str, np.ndarray]) -> None:
    problems = []
    missing, extra = sorted(set(want) - set(state)), sorted(set(state) - set(want))
    for key in missing:
        near = difflib.get_close_matches(key, extra, 1)
        problems.append(f"missing: {key} {want[key]}" + (f" (nearest: {near[0]})" if near else ""))
    for key in extra:
        near = difflib.get_close_matches(key, missing, 1)
        problems.append(
            f"extra: {key} {tuple(state[key].shape)}" + (f" (nearest: {near[0]})" if near else "")
        )
    for key in want:
        if key in state and tuple(state[key].shape) != want[key]:
            problems.append(f"misshapen: {key} is {tuple(state[key].shape)}, want {want[key]}")
    if problems:
        raise ZooError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))


def _check_constant(row: Constant, found: np.ndarray) -> None:
    error = float(np.abs(np.asarray(found, np.float64) - row.value()).max())
    if not error <= row.tolerance:
        raise ZooError(
            f"{row.key}: the checkpoint differs by {error:.2g} from this model's fixed values; "
            "it belongs to another architecture"
        )
