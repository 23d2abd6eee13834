"""What a run leaves for people and programs to read: `metrics.jsonl`, TensorBoard, a journal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zoo.whole import write_atomically

# tensorboardX imports PyTorch where it finds it, for drawing graphs, which takes seconds; here it
# finds none.
_torch = sys.modules.get("torch")
sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    del sys.modules["torch"]
    if _torch is not None:
        sys.modules["torch"] = _torch

_SECONDS_BETWEEN_FLUSHES = 5.0


class Sink(Protocol):
    """Takes the metrics too."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The `values` of `step`; after a return to a checkpoint, a step may come again."""
        ...

    def close(self) -> None:
        """There will be no more."""
        ...


class MetricsWriter:
    """One JSON object per logged step, the same numbers as TensorBoard scalars and to other sinks.

    Args:
      folder: of the run.
      step: the step that the run goes on from, see `go_back`.
      sinks: are told the same.
    """

    def __init__(self, folder: Path, step: int, sinks: Sequence[Sink] = ()):
        self._folder = folder
        self._sinks = sinks
        self._open(step)

    def go_back(self, step: int) -> None:
        """Go on from `step`. What was written for later steps is removed, so that no step occurs
        twice, and so is a last line that was cut off by a crash.
        """
        self._close()
        self._open(step)

    def _open(self, step: int) -> None:
        folder = self._folder
        self._file = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self._file) if record["step"] <= step]
        write_atomically(self._file, "".join(map(_line, kept)))
        self._out = open(self._file, "ab", buffering=0)  # noqa: SIM115 (see close)
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        # The writer proper, without the thread and the queue that SummaryWriter puts before it: a
        # full disk is then an error here instead of a thread that dies and a queue that nobody
        # empties.
        self._board = EventsWriter(str(board / "events"), f".{time.time_ns()}")
        restart = SessionLog(status=SessionLog.START)
        self._board.write_event(Event(step=step + 1, session_log=restart, wall_time=time.time()))
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the `values` of `step`."""
        self._out.write(_line({"step": step, **values}).encode())
        for name, value in values.items():
            event = Event(step=step, summary=scalar(name, value), wall_time=time.time())
            self._board.write_event(event)
        if (
            time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES
        ):  # each one waits for the disk
            self._board.flush()
            self._flushed = time.monotonic()
        for sink in self._sinks:
            sink.write(step, values)

    def sync(self) -> None:
        """Return when everything is on the disk."""
        os.fsync(self._out.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close the files and the other sinks."""
        self._close()
        for sink in self._sinks:
            sink.close()

    def _close(self) -> None:
        self._out.close()
        self._board.close()


class NoMetrics:
    """In place of a `MetricsWriter` where another process writes."""

    def go_back(self, step: int) -> None:
        """Do nothing, as all of these."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Likewise."""

    def sync(self) -> None:
        """Likewise."""

    def close(self) -> None:
        """Likewise."""


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """The whole records of a `metrics.jsonl`, in order; a torn last line is left out."""
    file = Path(file)
    if not file.exists():
        return []
    records = []
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class Journal:
    """`train.log`: what a run has to say, with the time, and details that would crowd a terminal.

    Args:
      file: appended to.
      tell: also told what is meant for the terminal.
    """

    def __init__(self, file: Path, tell: Callable[[str], None]):
        self._out = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (see close)
        self._tell = tell

    def say(self, text: str) -> None:
        """On the terminal and in the file."""
        self._tell(text)
        self.note(text)

    def note(self, text: str) -> None:
        """In the file only."""
        self._out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def _line(record: Mapping[str, Any]) -> str:
    # JSON knows neither NaN nor infinity.
    finite = {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()
    }
    return json.dumps(finite) + "\n"
