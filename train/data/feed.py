"""From the pipeline onto the devices: ahead of need, and how long the loop had to wait."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain

from zoo.train.data.pipeline import Arrays, BadRecords, BatchIterator


class _Ready(NamedTuple):
    """A batch on the devices, and where the pipeline stands behind it."""

    batch: Any
    state: dict[str, Any]
    bad: BadRecords


class Feed(grain.DatasetIterator):
    """Batches on the devices, up to `depth` of them ahead.

        batches = Feed(iter(pipeline), lambda batch: put_batch(batch, sharding), depth=2)

    Its state is that of the batch that was handed out last, however many are ahead of it.

    Args:
      batches: of the pipeline.
      put: brings a batch to the devices.
      depth: batches that a thread puts there ahead; 0 puts each when it is asked for.

    Attributes:
      bad: what was left out up to the batch handed out last.
      waited: seconds that `next` took so far, all together.
    """

    def __init__(self, batches: BatchIterator, put: Callable[[Arrays], Any], depth: int = 0):
        super().__init__()
        self._batches = batches
        self._put = put
        self._depth = depth
        self._ahead: _Ahead | None = None
        self._state, self.bad = batches.get_state(), batches.bad
        self.waited = 0.0

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with sources as a whole."""
        return self._batches.faults

    def __next__(self) -> Any:
        """The next batch, as `put` made it. Raises what reading it raised."""
        begun = time.monotonic()
        if self._depth and self._ahead is None:
            self._ahead = _Ahead(self._made, self._depth)
        ready = self._made() if self._ahead is None else self._ahead.get()
        self._state, self.bad = ready.state, ready.bad
        self.waited += time.monotonic() - begun
        return ready.batch

    def _made(self) -> _Ready:
        batch = self._put(next(self._batches))
        return _Ready(batch, self._batches.get_state(), self._batches.bad)

    def get_state(self) -> dict[str, Any]:
        """Where the batch handed out last ends, as plain JSON values."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self._stop()
        self._batches.set_state(state)
        self._state, self.bad = self._batches.get_state(), self._batches.bad

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop()
        self._batches.close()
        super().close()

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None


class _Ahead:
    """A thread that makes things before they are asked for; an exception comes out in its turn."""

    def __init__(self, make: Callable[[], _Ready], depth: int):
        self._make = make
        self._ready: queue.Queue[_Ready | BaseException] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def get(self) -> _Ready:
        made = self._ready.get()
        if isinstance(made, BaseException):
            self._ready.put(made)  # for whoever asks again
            raise made
        return made

    def stop(self) -> None:
        """Return when the thread has ended."""
        self._stopping.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get()
            self._thread.join(0.05)

    def _work(self) -> None:
        made: _Ready | BaseException
        while not self._stopping.is_set():
            try:
                made = self._make()
            except BaseException as error:
                made = error
            self._ready.put(made)
            if isinstance(made, BaseException):
                return
