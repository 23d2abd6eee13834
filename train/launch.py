"""Several processes that train as one: how they find each other, and what they do together.

    join()                                    # on every host, before anything else of JAX
    name = first(lambda: choose_a_name())     # one process acts, all know
    states = gathered(state)                  # what every process has to say

The engine is JAX's own: `jax.distributed` lets the processes find each other and notices when one
is gone, and arrays span all of their devices. What is not an array is exchanged as JSON. A process
without others is a job of its own, in which all of this is immediate.
"""

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from zoo.models.core.errors import UsageError, ZooError
from zoo.whole import locked

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""A process that is not heard of for so long is taken for dead, and the others stop."""

_PIECE = 1 << 28
"""Bytes of an array that are brought to one place at once."""

_ROOM = 2048
"""Bytes of what a process has to say that are exchanged in one go; more takes another."""

_LOST = re.compile(
    r"gloo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|connection (closed|reset)|broken pipe|heartbeat"
    r"|coordination service|NCCL|task .* (died|unhealthy)",
    re.IGNORECASE,
)
"""What JAX says when another process is gone."""


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Become one of the processes of a job. Comes before all that computes.

    Without arguments JAX looks for a TPU slice, a Slurm step of several tasks, an Open MPI job or a
    Kubernetes job; where there is none, the process stays by itself.

    Args:
      coordinator: "host:port" of process 0; the port is free there, and all hosts can reach it.
      num_processes: of the job.
      process_id: which of them this one is, from 0.

    Raises:
      UsageError: some arguments are there and others are missing or make no sense, or the launcher
        does not say where process 0 is.
      ZooError: the other processes did not come.
    """
    if jax.distributed.is_initialized():
        return
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        settings = _found()
        if settings is None:
            return
    elif missing:
        raise UsageError(
            f"--{', --'.join(missing)} missing: a process of a cluster needs --coordinator "
            "host:port, --num-processes and --process-id; on TPU slices and under Slurm none of "
            "them"
        )
    else:
        settings = _explicit(str(coordinator), int(num_processes or 0), int(process_id or 0))
        if settings["num_processes"] == 1:
            return
    # Signals are for `zoo.train.stop`; until that listens they end the process, as they should.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Kubernetes environment")
            jax.distributed.initialize(
                **settings,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise UsageError(f"the processes of this job cannot be told: {error}") from error
        # JAX has found no cluster.
    except jax.errors.JaxRuntimeError as error:
        raise ZooError(
            f"the processes of this job did not find each other: {str(error).splitlines()[0]}; all "
            "of them have to be started, and able to reach the coordinator"
        ) from error


def _explicit(coordinator: str, num_processes: int, process_id: int) -> dict[str, Any]:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UsageError(f"--coordinator is {coordinator!r}: want host:port, such as 10.0.0.1:8476")
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"--process-id is {process_id} of --num-processes {num_processes}: want 0 to "
            f"{num_processes - 1}"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _found() -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs where it can find the rest; None for one process.

    Launchers that start a single task per host leave all of its devices to it; JAX alone would give
    every task one.
    """
    env = os.environ
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:
        per_node = re.split(r",", re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "")))
        return {"local_device_ids": []} if set(per_node) == {"1"} else {}
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:
            raise UsageError(
                "this version of Open MPI does not tell JAX where process 0 is: start with "
                "--coordinator HOST:PORT --num-processes $OMPI_COMM_WORLD_SIZE --process-id "
                "$OMPI_COMM_WORLD_RANK"
            )
        return {"local_device_ids": []} if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else {}
    if env.get("JAX_PLATFORMS", "").split(",")[0] == "cpu" or "SLURM_NTASKS" in env:
        return None
    in_a_pod = "KUBERNETES_SERVICE_HOST" in env
    return None if in_a_pod and "JOB_COMPLETION_INDEX" not in env else {}


def is_first() -> bool:
    """Whether this is the process that writes what is there once for all: logs, configurations."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """The `value` of every process, in their order. All have to call it. Values are plain JSON."""
    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value).encode()
    room = _ROOM
    with lost_processes():
        while True:
            sent = len(data).to_bytes(8, "big") + data[:room]
            sent = np.frombuffer(sent.ljust(8 + room, b"\0"), np.uint8)
            texts = [bytes(text) for text in multihost_utils.process_allgather(sent)]
            longest = max(int.from_bytes(text[:8], "big") for text in texts)
            if longest <= room:
                break
            room = 1 << longest.bit_length()  # few sizes, few programs
    return [json.loads(text[8 : 8 + int.from_bytes(text[:8], "big")]) for text in texts]


def first(action: Callable[[], T]) -> T:
    """What `action` returns on the first process, which alone runs it. All have to call this.

    What it returns is plain JSON. What it raises, the others raise too.
    """
    if jax.process_count() == 1:
        return action()
    failed: BaseException | None = None
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": action()}
        except Exception as error:
            failed, said = error, {"error": type(error).__name__, "text": str(error)}
    told = gathered(said)[0]
    if failed is not None:
        raise failed
    if "error" in told:
        raised = {"UsageError": UsageError, "ZooError": ZooError}.get(told["error"], RuntimeError)
        raise raised(told["text"])
    return told["value"]


def made_once(make: Callable[[], T]) -> T:
    """`make()` of every process, that of the first one before the others: what it leaves on a disk
    that they share is there for them.
    """
    if jax.process_count() == 1:
        return make()
    made: list[T] = []
    first(lambda: made.append(make()))
    return made[0] if made else make()


@contextlib.contextmanager
def locked_together(folder: str | Path) -> Iterator[Path]:
    """As `zoo.whole.locked`, for all processes of a job.

    Raises:
      ZooError: as there, or the processes do not see the same folder.
    """
    with contextlib.ExitStack() as held:
        path = Path(first(lambda: str(held.enter_context(locked(folder)))))
        if jax.process_count() > 1:
            mark = path / ".together"
            first(lambda: mark.touch())
            blind = [process for process, sees in enumerate(gathered(mark.exists())) if not sees]
            first(lambda: mark.unlink(missing_ok=True))
            if blind:
                raise ZooError(
                    f"{path} of the first process is not there for process "
                    f"{', '.join(map(str, blind))}: want a folder on a file system that all hosts "
                    "share"
                )
        yield path


def on_the_host(tree: Any) -> Any:
    """All of every array of a tree as NumPy arrays, on the first process; elsewhere None for each.

    All processes have to call it. Arrays are brought together piece by piece.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    with lost_processes():
        return jax.tree.map(_on_the_host, tree)


def _on_the_host(array: jax.Array) -> np.ndarray | None:
    if array.is_fully_replicated:
        return np.asarray(array) if is_first() else None
    row = array.nbytes // array.shape[0]
    step = max(1, _PIECE // max(row, 1))
    pieces = []
    for start in range(0, array.shape[0], step):
        part = array if step >= array.shape[0] else array[start : start + step]
        piece = multihost_utils.process_allgather(part, tiled=True)
        if is_first():
            pieces.append(piece)
    return np.concatenate(pieces) if pieces else None


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn what JAX raises when another process is gone into one clear ZooError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of JAX; which of them depends on where it waits
        if (problem := lost(error)) is None:
            raise
        raise problem from error


def lost(error: BaseException) -> "LostProcessError | None":
    """What to raise in place of `error` if it means that another process is gone, else None."""
    if jax.process_count() == 1 or not _LOST.search(str(error)):
        return None
    return LostProcessError(
        f"process {jax.process_index()} of {jax.process_count()} stops: another one is gone "
        f"({str(error).splitlines()[0][:200]}). Start all of them again with the same command to "
        "continue from the last checkpoint"
    )


class LostProcessError(ZooError):
    """Another process of the job is gone."""


@contextlib.contextmanager
def one_of_several() -> Iterator[None]:
    """End this process, with a line that says why, as soon as another one of its job is gone.

    An orderly end would wait for that one.
    """
    try:
        yield
    except LostProcessError as error:
        print(f"zoo: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
