"""Checkpoints that are either whole or not there, written while training goes on.

`checkpoints/<step>/` holds what Orbax writes for `params` (those that train), `opt_state`,
`average`, `stats` and `aux` (where there are any) and `rest` (step, random key and other numbers,
and the place in the data), `metrics.json`, and at last `manifest.json` with the length and SHA-256
of every file. Orbax alone does not notice a flipped bit in an array; here a checkpoint without a
manifest is unfinished, and one that differs from it is damaged. Neither is restored: both are set
aside, and removed when a later good one exists.

`checkpoints/frozen/` holds, once for all checkpoints, the parameters that do not train, and
`checkpoints/fixed/` what the objective carries unchanged, where there are such.

Of several processes each writes its part of the arrays, and the first one everything else.
"""

import errno
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from zoo.models.core.errors import ZooError
from zoo.train.config import Best
from zoo.train.data.pipeline import merged
from zoo.train.launch import first, gathered, is_first, lost
from zoo.train.state import HEALTHY, TrainState, nbytes
from zoo.whole import check, write_manifest

OVERHEAD = 1_000_000
"""Bytes, at most, of what a checkpoint holds beside its arrays: some dozens of small files."""
_SET_ASIDE, _METRICS = "damaged", "metrics.json"
_CHANGING = ("params", "opt_state", "average", "stats", "aux")
_ONCE = ("frozen", "fixed")
_NUMBERS = ("step", "key", "skipped", "typical")

FORM = 1
"""Version of the form described above; checkpoints of another one are refused."""

# Orbax lets the devices that hold copies of an array write a slice of it each, which compiles a
# program per slice and shape: seconds for a model of kilobytes. Only large arrays are worth it.
_ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 24),
    )
)
# No stack traces of Orbax's threads: their errors arrive as exceptions, which are reported.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are; it is created.
      keep: how many of the newest stay.
      say: is told in one line about everything that is not as it should be.
      best: which others stay because they are good.

    Attributes:
      newest: the step of the newest one that is whole, or None.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        say: Callable[[str], None],
        best: Best = Best(),  # noqa: B008 (frozen)
    ):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._best = best
        self._say = say
        self.newest: int | None = first(self._sweep)
        self._writing: threading.Thread | None = None
        self._failure: ZooError | None = None
        handlers = {
            **{
                name: ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS)
                for name in _CHANGING
            },
            "rest": ocp.JsonCheckpointHandler(),
        }
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return _steps(self.folder)

    def save(
        self,
        state: TrainState,
        data: grain.DatasetIterator,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Begin to write a checkpoint of this state and place in the data.

        The state may be used up when this returns; the checkpoint is whole after `wait`.

        Args:
          state: what is written.
          data: its place is.
          metrics: of this step; by one of them checkpoints are good.

        Raises:
          ZooError: it could not be written; those before it are untouched.
        """
        self.wait()
        step = int(state.step)
        path = self.folder / str(step)
        rest = {name: np.asarray(getattr(state, name)).tolist() for name in _NUMBERS}
        rest |= {"form": FORM, "data": merged(gathered(data.get_state()))}
        trees = _trees(state, _CHANGING)
        if jax.default_backend() == "cpu":
            # What is written there is the very memory that the next step is given to use up. It is
            # spared as long as it is looked at, but nothing promises that.
            trees = jax.tree.map(lambda x: x.copy(), trees)
        args = ocp.args.Composite(
            **{name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()},
            rest=ocp.args.JsonSave(rest),
        )
        once = {
            name: tree
            for name, tree in _trees(state, _ONCE).items()
            if not (self.folder / name).exists()
        }
        free = shutil.disk_usage(self.folder).free
        if free < nbytes((trees, once)) / jax.process_count() + OVERHEAD:
            raise self._failed(step, f"the disk is full ({free / 1e6:.1f} MB left)")
        try:
            for name, tree in once.items():
                self._save_once(name, tree)
            self._checkpointer.save(path, args=args, force=True)
        except Exception as error:  # Orbax and TensorStore raise many sorts for a failed write
            raise lost(error) or self._failed(step, _why(error)) from error
        self._writing = threading.Thread(
            target=self._finish, args=(step, path, dict(metrics or {})), name="checkpoint"
        )
        self._writing.start()
        return path

    def poll(self) -> None:
        """Raise what `wait` would, if the last save has come to its end; else do nothing."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint that `save` began is whole.

        Raises:
          ZooError: it could not be written; those before it are untouched.
        """
        if self._writing is None:
            return
        self._writing.join()
        self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest state, on the shardings of `abstract`; `data` goes to its place.

        Raises:
          ZooError: it is of another form, does not fit the model or cannot be read.
        """
        self.wait()
        path = self.folder / str(self.newest)
        trees = _trees(abstract, _CHANGING)
        args = ocp.args.Composite(**{name: _restore_onto(tree) for name, tree in trees.items()})
        only_rest = ocp.args.Composite(rest=ocp.args.JsonRestore())

        def put(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(np.asarray(value, like.dtype), like.sharding)

        rest: dict[str, Any] = {}
        try:
            rest = self._checkpointer.restore(path, args=only_rest)["rest"]
            if (form := rest.get("form", FORM)) != FORM:
                raise _of_another_form(path, f"{form}, want {FORM}")
            numbers = {name: put(rest[name], getattr(abstract, name)) for name in _NUMBERS}
            found = self._checkpointer.restore(path, args=args)
            data.set_state(rest["data"])
            once = {
                name: self._restore_once(name, tree)
                for name, tree in _trees(abstract, _ONCE).items()
            }
        except ZooError:
            raise
        except Exception as error:
            if rest and (differs := _difference(path, rest, trees)):
                raise _of_another_form(path, differs) from error
            raise ZooError(f"checkpoint {path} could not be restored: {_why(error)}") from error
        return abstract.replace(
            **numbers,
            **{name: found[name] for name in trees},
            **once,
            fault=put(HEALTHY, abstract.fault),
        )

    def close(self) -> None:
        """Let go of what Orbax holds. A failed save is not reported any more."""
        if self._writing is not None:
            self._writing.join()
        self._checkpointer.close()

    def _finish(self, step: int, path: Path, metrics: dict[str, float]) -> None:
        """Make what Orbax writes in the background a whole checkpoint; runs in a thread."""
        try:
            self._checkpointer.wait_until_finished()
            if is_first():
                finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
                (path / _METRICS).write_text(json.dumps(finite), "utf-8")
                write_manifest(path)
        except Exception as error:
            self._failure = lost(error) or self._failed(step, _why(error))
            return
        self.newest = step
        if is_first():
            self._prune()

    def _save_once(self, name: str, tree: Any) -> None:
        """Write what never changes; it is there as a whole or not at all."""
        new = self.folder / f".{name}.new"
        with _checkpointer() as checkpointer:
            checkpointer.save(new, args=ocp.args.PyTreeSave(tree), force=True)

        def declare() -> None:
            write_manifest(new)
            new.rename(self.folder / name)

        first(declare)

    def _restore_once(self, name: str, abstract: Any) -> Any:
        folder = self.folder / name
        if problem := check(folder):
            raise ZooError(
                f"the {name} parameters in {folder} cannot be used: {problem}; bring the folder "
                "back, or begin again in another output folder"
            )
        with _checkpointer() as checkpointer:
            return checkpointer.restore(folder, args=_restore_onto(abstract))

    def _failed(self, step: int, why: str) -> ZooError:
        """The error to raise, after what is left of the checkpoint has been removed."""
        self._remove_unfinished()
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        last = "there is none before it"
        if self.newest is not None:
            last = f"the last good one is {self.folder / str(self.newest)}"
        return ZooError(
            f"checkpoint of step {step} could not be written to {self.folder}: {why}; {last}"
        )

    def _sweep(self) -> int | None:
        """Remove unfinished saves, set aside what cannot be used, return the newest good step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        for step in reversed(self.steps):
            problem = check(self.folder / str(step))
            if problem is None:
                return step
            aside = self.folder / _SET_ASIDE / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            older = self.steps
            instead = (
                f"the one of step {older[-1]}" if older else "the beginning: there is no other"
            )
            self._say(
                f"checkpoint {self.folder / str(step)} cannot be used: {problem}. Moved to "
                f"{aside}; falling back to {instead}"
            )
        for name in _ONCE:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # of a first that is not there
        return None

    def _remove_unfinished(self) -> None:
        """Remove what saves left that did not come as far as their final name."""
        for path in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name.endswith(".new"):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Remove all but the newest and the best, and bad ones that this run has caught up with."""
        steps = self.steps
        values = {step: self._value(step) for step in steps if self._value(step) is not None}
        ranked = sorted(values, key=lambda step: (values[step], -step), reverse=True)
        stay = {*steps[-self._keep :], *ranked[: self._best.number]}
        for step in steps:
            if step not in stay:
                old = self.folder / f".{step}.new"  # from here on it is removed, also if killed
                (self.folder / str(step)).rename(old)
                shutil.rmtree(old, ignore_errors=True)
        aside = self.folder / _SET_ASIDE
        if aside.exists() and max(_steps(aside), default=0) <= (self.newest or 0):
            shutil.rmtree(aside, ignore_errors=True)

    def _value(self, step: int) -> float | None:
        """How good a checkpoint is, more being better; None if its step was not judged."""
        try:
            metrics = json.loads((self.folder / str(step) / _METRICS).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        value = metrics.get(self._best.metric)
        return None if value is None else float(value if self._best.largest else -value)


def _trees(state: TrainState, names: Iterable[str]) -> dict[str, Any]:
    """Those of these fields that hold anything."""
    found = {name: getattr(state, name) for name in names}
    return {name: tree for name, tree in found.items() if jax.tree.leaves(tree)}


def _of_another_form(path: Path, why: str) -> ZooError:
    return ZooError(
        f"checkpoint {path} is of another form than this version reads ({why}): finish the run "
        "with the version that began it, or begin again in another output folder"
    )


def _difference(path: Path, rest: Mapping[str, Any], trees: Mapping[str, Any]) -> str | None:
    """What a checkpoint lacks, or has beyond what is asked for; None if neither."""
    wanted, found = {*trees, *_NUMBERS, "data"}, {*rest} - {"form"}
    found |= {name for name in _CHANGING if (path / name).is_dir()}
    for name in found & trees.keys():
        stored = ocp.PyTreeCheckpointHandler().metadata(path / name).tree
        found |= {f"{name}/{leaf}" for leaf in _leaves(stored)}
        wanted |= {f"{name}/{leaf}" for leaf in _leaves(trees[name])}
    if missing := sorted(wanted - found):
        return f"{missing[0]} is missing"
    if surplus := sorted(found - wanted):
        return f"{surplus[0]} is unknown to it"
    return None


def _leaves(tree: Any) -> set[str]:
    """The paths of the leaves."""
    names = (tuple(map(_key, path)) for path, _ in jax.tree.leaves_with_path(tree))
    return {"/".join(path) for path in names}


def _key(entry: Any) -> str:
    """A step of a path, whatever sort of node it leaves: on the disk all are mappings."""
    return str(
        next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))
    )


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS))


def _restore_onto(abstract: Any) -> ocp.args.PyTreeRestore:
    """Read a tree onto the shardings of `abstract`."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _why(error: BaseException) -> str:
    """The cause in a line, also where a library has wrapped it up."""
    text = str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text
    return "the disk is full" if full else (text.splitlines() or [type(error).__name__])[0][:300]
