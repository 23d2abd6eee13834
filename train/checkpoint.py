"""Checkpoints that are either whole or not there.

`checkpoints/<step>/` holds what Orbax writes for `params` (those that train), `average` (where
there is one), `opt_state`, `data` (the place in the data) and `rest` (step and random key), and at
last `manifest.json` with the length and SHA-256 of every file. Orbax alone does not notice a
flipped bit in an array; here a checkpoint without a manifest is unfinished, and one that differs
from it is damaged. Neither is restored: both are set aside, and removed when a later good one
exists.

`checkpoints/frozen/`, where some parameters do not train, holds these once for all checkpoints.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from zoo.models.core.errors import ZooError
from zoo.train.state import HEALTHY, TrainState, nbytes
from zoo.whole import check, write_manifest

OVERHEAD = 1_000_000
"""Bytes, at most, of what a checkpoint holds beside its arrays: some dozens of small files."""
_SET_ASIDE, _FROZEN = "damaged", "frozen"

# Orbax lets the devices that hold copies of an array write a slice of it each, which compiles a
# program per slice and shape: seconds for a model of kilobytes. Only large arrays are worth it.
_ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 24),
    )
)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are; it is created.
      keep: how many stay.
      say: is told in one line about everything that is not as it should be.
    """

    def __init__(self, folder: str | Path, keep: int, say: Callable[[str], None]):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._say = say
        self.newest = self._sweep()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False),
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS),
                "average": ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS),
                "opt_state": ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS),
                "data": grain.checkpoint.CheckpointHandler(),
                "rest": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return _steps(self.folder)

    def save(self, state: TrainState, data: grain.DatasetIterator) -> Path:
        """Write a checkpoint of this state and place in the data; it is whole when this returns.

        Raises:
          ZooError: it could not be written; those before it are untouched.
        """
        step = int(state.step)
        path = self.folder / str(step)
        rest = {"step": step, "key": np.asarray(state.key).tolist()}
        trees = {"params": state.params, "opt_state": state.opt_state}
        if state.average is not None:
            trees["average"] = state.average
        args = ocp.args.Composite(
            **{name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()},
            data=grain.checkpoint.CheckpointSave(data),
            rest=ocp.args.JsonSave(rest),
        )
        once = state.frozen if state.frozen and not self._frozen.exists() else {}
        free = shutil.disk_usage(self.folder).free
        if free < nbytes((trees, once)) + OVERHEAD:
            raise self._failed(step, f"the disk is full ({free / 1e6:.1f} MB left)")
        try:
            with _quiet():
                if once:
                    self._save_frozen(once)
                self._manager.save(step, args=args, force=True)
            write_manifest(path)
        except Exception as error:  # Orbax and TensorStore raise many sorts for a failed write
            self._remove_unfinished()
            shutil.rmtree(path, ignore_errors=True)
            raise self._failed(step, _why(error)) from error
        self.newest = step
        self._prune()
        return path

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest state, on the shardings of `abstract`; `data` goes to its place.

        Raises:
          ZooError: it does not fit the model or cannot be read.
        """
        path = self.folder / str(self.newest)
        trees = {"params": abstract.params, "opt_state": abstract.opt_state}
        if abstract.average is not None:
            trees["average"] = abstract.average
        args = ocp.args.Composite(
            **{name: _restore_onto(tree) for name, tree in trees.items()},
            data=grain.checkpoint.CheckpointRestore(data),
            rest=ocp.args.JsonRestore(),
        )
        try:
            with _quiet():
                found = self._manager.restore(self.newest, args=args)
                frozen = self._restore_frozen(abstract.frozen) if abstract.frozen else {}
        except ZooError:
            raise
        except Exception as error:
            raise ZooError(f"checkpoint {path} could not be restored: {_why(error)}") from error

        def put(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(np.asarray(value, like.dtype), like.sharding)

        return TrainState(
            step=put(found["rest"]["step"], abstract.step),
            params=found["params"],
            frozen=frozen,
            average=found["average"] if "average" in trees else None,
            opt_state=found["opt_state"],
            key=put(found["rest"]["key"], abstract.key),
            fault=put(HEALTHY, abstract.fault),
        )

    def close(self) -> None:
        """Let go of what Orbax holds. A failed save, already reported, is not reported again."""
        with _quiet(), contextlib.suppress(Exception):
            self._manager.close()

    @property
    def _frozen(self) -> Path:
        return self.folder / _FROZEN

    def _save_frozen(self, frozen: Any) -> None:
        """Write what never changes; it is there as a whole or not at all."""
        new = self.folder / f".{_FROZEN}.new"
        shutil.rmtree(new, ignore_errors=True)
        with _frozen_checkpointer() as checkpointer:
            checkpointer.save(new, args=ocp.args.PyTreeSave(frozen))
        write_manifest(new)
        new.rename(self._frozen)

    def _restore_frozen(self, abstract: Any) -> Any:
        if problem := check(self._frozen):
            raise ZooError(
                f"the frozen parameters in {self._frozen} cannot be used: {problem}; bring the "
                "folder back, or begin again in another output folder"
            )
        with _frozen_checkpointer() as checkpointer:
            return checkpointer.restore(self._frozen, args=_restore_onto(abstract))

    def _failed(self, step: int, why: str) -> ZooError:
        last = "there is none before it"
        if self.newest is not None:
            last = f"the last good one is {self.folder / str(self.newest)}"
        return ZooError(
            f"checkpoint of step {step} could not be written to {self.folder}: {why}; {last}"
        )

    def _sweep(self) -> int | None:
        """Set aside what cannot be used, remove unfinished saves, return the newest good step."""
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
        shutil.rmtree(self._frozen, ignore_errors=True)  # whose first checkpoint is not there
        return None

    def _remove_unfinished(self) -> None:
        """Remove what saves left that did not come as far as their final name."""
        for path in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name == f".{_FROZEN}.new":
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Remove all but the newest `keep`, and bad ones that this run has caught up with."""
        for step in self.steps[: -self._keep]:
            self._manager.delete(step)
        aside = self.folder / _SET_ASIDE
        if aside.exists() and max(_steps(aside), default=0) <= (self.newest or 0):
            shutil.rmtree(aside, ignore_errors=True)


def _frozen_checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS))


def _restore_onto(abstract: Any) -> ocp.args.PyTreeRestore:
    """Read a tree onto the shardings of `abstract`."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=restore_args)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No stack traces of Orbax's threads: their errors arrive as exceptions, which are reported."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _why(error: BaseException) -> str:
    """The cause in a line, also where a library has wrapped it up."""
    text = str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text
    return "the disk is full" if full else (text.splitlines() or [type(error).__name__])[0][:300]
