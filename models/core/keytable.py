"""Key tables: which tensor of another code's checkpoint is which parameter of ours, in both
directions.

A `Table` is a tuple of rows. Each row ties parameters of ours (paths such as
"stack/layers/q/kernel") to tensors of theirs ("layers.{}.self_attn.q_proj.weight") by a named
transform. A row with `steps` describes stacked parameters: row r of our leaf belongs to the key
with `{}` replaced by `steps[r]`. Conversion is strict both ways: missing, extra and misshapen
tensors raise one error that lists them all.

Nothing here needs whole checkpoints in memory: a state dict is any mapping to things with a `shape`
and a `dtype` that `np.asarray` turns into arrays, and `Table.stream` asks for each of them once,
when its turn has come.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.errors import ZooError
from zoo.models.core.tree import flatten_dict, unflatten_dict

Shape = tuple[int, ...]
State = Mapping[str, Any]
"""A state dict of theirs: {key: array, or what `np.asarray` turns into one}."""


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
    "conv",
    lambda theirs, _: [np.moveaxis(theirs[0], (1, 0), (-2, -1))],
    lambda ours: [np.moveaxis(ours[0], (-2, -1), (1, 0))],
)
"""Their convolution kernel [out, in, h, w], ours [h, w, in, out]; with any number of axes."""


pointwise = Transform(
    "pointwise",
    lambda theirs, _: [theirs[0][:, :, 0, 0].T],
    lambda ours: [ours[0].T[:, :, None, None]],
)
"""Their 1 x 1 convolution [out, in, 1, 1], our linear map [in, out]."""


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


def repeated(times: int, each: Transform) -> Transform:
    """Their `times` tensors are all the same one; ours, by `each`, is one of them."""

    def load(theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        differing = [i for i in range(1, times) if not np.array_equal(theirs[i], theirs[0])]
        if differing:
            raise ZooError(
                f"{len(differing)} of {times} tensors differ from the first, and this model has "
                "one for all of them: the checkpoint belongs to another architecture"
            )
        return each.load(theirs[:1], shapes)

    name = f"repeated({times}, {each.name})"
    return Transform(name, load, lambda ours: list(each.save(ours)) * times)


@dataclass(frozen=True)
class Row:
    """Ties `paths` of ours to `keys` of theirs.

    Attributes:
      paths: one path, or several.
      keys: one key, or several; with `steps`, each has a `{}`.
      transform: between them.
      steps: step number of every row of our stacked leaves, or what the keys have in its place;
        None for leaves that are not stacked.
    """

    paths: str | tuple[str, ...]
    keys: str | tuple[str, ...]
    transform: Transform = same
    steps: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that is no parameter of ours: checked on load, written again on save."""

    key: str
    value: Callable[[], np.ndarray]
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Alias:
    """A second name of another tensor of theirs, as a tied output head has: where a checkpoint
    holds both, they must be equal; saving leaves it out.

    Attributes:
      key: the second name.
      of: the first, which another row has.
    """

    key: str
    of: str


@dataclass(frozen=True)
class Ignored:
    """Tensors of theirs that say nothing about a model: passed over where they are there, never
    written.

    Attributes:
      pattern: a regular expression for their whole keys.
    """

    pattern: str


AnyRow = Row | Constant | Alias | Ignored


@dataclass(frozen=True)
class Piece:
    """Parameters on their way in: what one set of tensors of theirs becomes.

    Attributes:
      leaves: {path: shape and dtype} of the parameters that it belongs to, stacked ones as a whole.
      row: which row of stacked parameters it is; None for parameters that are not stacked.
      keys: the tensors of theirs.
      read: reads them: {path: array}, which may be views of a file.
    """

    leaves: dict[str, tuple[Shape, np.dtype]]
    row: int | None
    keys: tuple[str, ...]
    read: Callable[[], dict[str, np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        rows = [shape if self.row is None else shape[1:] for shape, _ in self.leaves.values()]
        dtypes = [dtype for _, dtype in self.leaves.values()]
        return sum(math.prod(s) * t.itemsize for s, t in zip(rows, dtypes, strict=True))


@dataclass(frozen=True)
class Table:
    """The rows of one checkpoint layout."""

    rows: tuple[AnyRow, ...]

    def __add__(self, other: "Table") -> "Table":
        return Table(self.rows + other.rows)

    def under(self, ours: str = "", theirs: str = "") -> "Table":
        """The same table one level deeper:

        `ours` is a path ("tower"), `theirs` a prefix ("vision_tower."). Paths that begin with
        `stats/`, or `params/`, still do.
        """

        def move(row: AnyRow) -> AnyRow:
            if isinstance(row, Constant):
                return dataclasses.replace(row, key=theirs + row.key)
            if isinstance(row, Alias):
                return Alias(theirs + row.key, theirs + row.of)
            if isinstance(row, Ignored):
                return Ignored(re.escape(theirs) + row.pattern)
            paths = tuple(_deeper(path, ours) for path in _many(row.paths))
            return dataclasses.replace(
                row, paths=paths, keys=tuple(theirs + k for k in _many(row.keys))
            )

        return Table(tuple(move(row) for row in self.rows))

    def with_stats(self) -> "Table":
        """The same table for `{"params": ..., "stats": ...}`: paths that do not begin with `stats/`
        are those of parameters.
        """

        def name(row: AnyRow) -> AnyRow:
            if not isinstance(row, Row):
                return row
            paths = _many(row.paths)
            named = (path if path.startswith("stats/") else f"params/{path}" for path in paths)
            return dataclasses.replace(row, paths=tuple(named))

        return Table(tuple(name(row) for row in self.rows))

    @property
    def aliases(self) -> dict[str, str]:
        """{second name: first name} of the tensors of theirs that have two."""
        return {row.key: row.of for row in self.rows if isinstance(row, Alias)}

    @property
    def ignored(self) -> re.Pattern[str] | None:
        """What the whole keys match that are passed over; None if none are."""
        patterns = [row.pattern for row in self.rows if isinstance(row, Ignored)]
        return re.compile("|".join(f"(?:{each})" for each in patterns)) if patterns else None

    def shapes(self, params: Mapping[str, Any]) -> dict[str, Shape]:
        """{their key: shape} of the whole checkpoint, from our parameters or their shapes alone."""
        flat_params = _flatten(params)
        self._check_paths(flat_params)
        out = {}
        for row in self.rows:
            if isinstance(row, Constant):
                out[row.key] = row.value().shape
            elif isinstance(row, Row):
                out |= _their_shapes(row, flat_params)
        return out

    def stream(self, state: State, params: Mapping[str, Any]) -> Iterator[Piece]:
        """Our parameters from their state dict, a piece at a time.

        Rows with the largest tensors come first: what is needed to convert one of them is then
        never needed on top of all that has been converted.

        Args:
          state: {key: array}; all keys and shapes are checked before the first array is read.
          params: our parameters or their shapes (`jax.eval_shape`), for the tree to fill.

        Raises:
          ZooError: listing every missing, extra or misshapen tensor; or naming one that differs
            from the value or the tensor that it must be equal to.
        """
        _check_keys(self.shapes(params), self._without_ignored(state), self.aliases)
        for row in self.rows:
            if isinstance(row, Constant):
                _check_constant(row, state[row.key])
            elif isinstance(row, Alias) and row.key in state:
                _check_alias(row, state)
        flat_params = _flatten(params)
        rows = self._largest_first(flat_params)
        return (piece for row in rows for piece in _pieces(row, state, flat_params))

    def _without_ignored(self, state: State) -> State:
        if (ignored := self.ignored) is None:
            return state
        return {key: state[key] for key in state if not ignored.fullmatch(key)}

    def _largest_first(self, flat_params: Mapping[str, Any]) -> list[Row]:
        def largest(row: Row) -> int:
            return max(math.prod(_row_shape(flat_params[path], row)) for path in _many(row.paths))

        return sorted((row for row in self.rows if isinstance(row, Row)), key=largest)[::-1]

    def load(self, state: State, params: Mapping[str, Any]) -> dict[str, Any]:
        """Our parameters from their state dict, as a nested dict of NumPy arrays in the dtype of
        `state`. Arguments and errors are those of `stream`.
        """
        out: dict[str, np.ndarray] = {}
        for piece in self.stream(state, params):
            for path, array in piece.read().items():
                if path not in out:
                    out[path] = np.empty(*piece.leaves[path])
                out[path][... if piece.row is None else piece.row] = array
        return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in out.items()})

    def save(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Their state dict from our parameters."""
        return {key: array for tensors in self.unstream(params) for key, array in tensors.items()}

    def unstream(self, params: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        """The tensors of `save`, a few at a time and in the order of `stream`.

        Args:
          params: our parameters, or things with their `shape` that `np.asarray` turns into arrays,
            and that an index turns into a row of a stacked one, which may also be a tuple of rows.
        """
        flat_params = _flatten(params)
        self._check_paths(flat_params)
        yield {row.key: row.value() for row in self.rows if isinstance(row, Constant)}
        for row in self._largest_first(flat_params):
            leaves = {path: _on_host(flat_params[path]) for path in _many(row.paths)}
            for r, paths, keys in instances(row):
                ours = [np.asarray(leaves[p] if r is None else leaves[p][r]) for p in paths]
                theirs = row.transform.save(ours)
                yield {k: np.asarray(t, order="C") for k, t in zip(keys, theirs, strict=True)}

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


def weight_rows(
    path: str,
    key: str,
    transform: Transform | None = None,
    *,
    steps: tuple[int | str, ...] | None = None,
    bias: bool = True,
) -> list[Row]:
    """Rows of a linear map or a convolution: `kernel`, by `linear()` unless told otherwise, and
    `bias` where there is one.
    """
    rows = [Row(f"{path}/kernel", f"{key}.weight", transform or linear(), steps)]
    return rows + [Row(f"{path}/bias", f"{key}.bias", flat, steps)] * bias


def norm_rows(
    path: str, key: str, *, steps: tuple[int | str, ...] | None = None, stats: bool = False
) -> list[AnyRow]:
    """Rows of a norm with scale and bias; with `stats`, of a BatchNorm, whose running statistics
    stand below `stats/` (see `Table.with_stats`) and whose count of batches is passed over.
    """
    rows: list[AnyRow] = [
        Row(f"{path}/scale", f"{key}.weight", steps=steps),
        Row(f"{path}/bias", f"{key}.bias", steps=steps),
    ]
    if stats:
        rows.append(Row(f"stats/{path}/mean", f"{key}.running_mean", steps=steps))
        rows.append(Row(f"stats/{path}/var", f"{key}.running_var", steps=steps))
        number = re.escape(key).replace(r"\{\}", "[^.]+")
        rows.append(Ignored(rf"{number}\.num_batches_tracked"))
    return rows


def _deeper(path: str, below: str) -> str:
    """`path` below another one, its collection still in front."""
    collection = next((name for name in ("stats/", "params/") if path.startswith(name)), "")
    return collection + f"{below}/{path.removeprefix(collection)}".strip("/")


def _many(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "/".join(path): _Apart(leaf) if isinstance(leaf, tuple) else leaf
        for path, leaf in flatten_dict(dict(params)).items()
    }


class _Apart:
    """A stacked parameter whose rows are arrays of their own."""

    def __init__(self, rows: tuple[Any, ...]):
        self._rows = rows
        self.shape = (len(rows), *rows[0].shape)

    def __getitem__(self, row: int) -> Any:
        return self._rows[row]


def instances(row: Row) -> Iterator[tuple[int | None, tuple[str, ...], tuple[str, ...]]]:
    """(row number, paths, keys) of every set of tensors that a row ties together."""
    paths, keys = _many(row.paths), _many(row.keys)
    if row.steps is None:
        yield None, paths, keys
        return
    for r, step in enumerate(row.steps):
        yield r, paths, tuple(key.format(step) for key in keys)


def _row_shape(leaf: Any, row: Row) -> Shape:
    return tuple(leaf.shape if row.steps is None else leaf.shape[1:])


def _their_shapes(row: Row, flat_params: Mapping[str, Any]) -> dict[str, Shape]:
    out = {}
    for _, paths, keys in instances(row):
        ours = [np.broadcast_to(np.int8(0), _row_shape(flat_params[p], row)) for p in paths]
        for key, theirs in zip(keys, row.transform.save(ours), strict=True):
            out[key] = tuple(theirs.shape)
    return out


def _pieces(row: Row, state: State, flat_params: Mapping[str, Any]) -> Iterator[Piece]:
    found = list(instances(row))
    dtype = np.dtype(jnp.result_type(*(state[key].dtype for *_, keys in found for key in keys)))
    leaves = {path: (tuple(flat_params[path].shape), dtype) for path in _many(row.paths)}
    shapes = [_row_shape(flat_params[path], row) for path in _many(row.paths)]

    def read(paths: tuple[str, ...], keys: tuple[str, ...]) -> dict[str, np.ndarray]:
        arrays = row.transform.load([np.asarray(state[key]) for key in keys], shapes)
        return dict(zip(paths, arrays, strict=True))

    for r, paths, keys in found:
        yield Piece(leaves, r, keys, partial(read, paths, keys))


def _on_host(leaf: Any) -> Any:
    """A parameter on devices as one array: to fetch it row by row would compile a slice."""
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _check_keys(want: Mapping[str, Shape], state: State, aliases: Mapping[str, str]) -> None:
    problems = []
    missing = sorted(set(want) - set(state))
    extra = sorted(set(state) - set(want) - set(aliases))
    want = {**want, **{key: want[of] for key, of in aliases.items() if key in state}}
    for number, key in enumerate(missing):
        problems.append(f"missing: {key} {want[key]}{_nearest(number, key, extra)}")
    for number, key in enumerate(extra):
        shape = tuple(state[key].shape)
        problems.append(f"extra: {key} {shape}{_nearest(number, key, missing)}")
    for key in want:
        if key in state and tuple(state[key].shape) != want[key]:
            problems.append(f"misshapen: {key} is {tuple(state[key].shape)}, want {want[key]}")
    if problems:
        raise ZooError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))


def _nearest(number: int, key: str, others: Sequence[str]) -> str:
    """The name most like `key`; beyond the first problems it helps nobody, and takes long."""
    near = difflib.get_close_matches(key, others, 1) if number < 50 else []
    return f" (nearest: {near[0]})" if near else ""


def _check_alias(row: Alias, state: State) -> None:
    first, second = np.asarray(state[row.of]), np.asarray(state[row.key])
    if not np.array_equal(first, second):
        raise ZooError(
            f"{row.key} differs from {row.of}, and the configuration says that the two are tied "
            "(tie_word_embeddings): the configuration belongs to another checkpoint"
        )


def _check_constant(row: Constant, found: np.ndarray) -> None:
    error = float(np.abs(np.asarray(found, np.float64) - row.value()).max())
    if not error <= row.tolerance:
        raise ZooError(
            f"{row.key}: the checkpoint differs by {error:.2g} from this model's fixed values; "
            "it belongs to another architecture"
        )
