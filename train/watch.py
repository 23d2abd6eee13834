"""What is recorded of a run beside its metrics: profiles, and a copy for Weights & Biases."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from zoo.models.core.codec import encode
from zoo.models.core.errors import UsageError
from zoo.train.config import Experiment
from zoo.train.metrics import Sink
from zoo.whole import write_atomically

PROFILE = "profile"
"""Folder of a run that holds the profiles, one for each sitting that takes one."""

_ID = "wandb.id"


def sinks(experiment: Experiment, folder: Path) -> list[Sink]:
    """What is sent the metrics of a run beside its files."""
    project = experiment.watch.wandb
    if project is None:
        return []
    return [Wandb(project, experiment.name, folder, encode(experiment))]


class Profile:
    """A profile of some steps, for TensorBoard and Perfetto.

    Args:
      folder: of the run.
      steps: the first and the last step of it, counted from 1; None: there is none.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder = folder / PROFILE
        self._steps = steps
        self._running = False

    def before(self, step: int) -> None:
        """Step `step` is about to be made."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Step `step` was made, or is under way with these results."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class Wandb:
    """The metrics of a run, sent to Weights & Biases; a run that is continued goes on there too.

    Args:
      project: where they go.
      name: of the run.
      folder: of the run, which remembers what it is called there.
      config: what is trained, as plain values.

    Raises:
      UsageError: the package is not installed.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                f"watch.wandb is {project!r} and wandb is not installed: pip install wandb, or "
                "leave it out"
            ) from error
        file = folder / _ID
        if not file.exists():
            write_atomically(file, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=name,
            id=file.read_text("utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        # Its own count of steps never goes back, as a run does that continues from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the `values` of `step`."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()
