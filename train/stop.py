"""Ending a run in order when someone asks for it: Ctrl-C and SIGTERM."""

import signal
import sys
import threading
from collections import deque
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted; the second one ends the process.

    Outside of the main thread, where Python knows no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # The kernel's own way to end a process also works while the program is inside a long
        # compilation.
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # nobody will be there to give the cursor back


class SharedStop(StopRequest):
    """A `StopRequest` of all processes of a job: what one of them notes ends all after one step.

    Every process asks the others with each step, on the devices, and looks at the answer some steps
    later, so that none waits. By itself a process hears only itself, and at once.

    Args:
      mesh: of all devices.
      behind: how many steps later.
    """

    def __init__(self, mesh: Mesh, behind: int):
        super().__init__()
        self._behind = behind
        self._answers: deque[jax.Array] = deque()
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._local = len(mesh.local_devices)
        self._agreed: signal.Signals | None = None

    @property
    def agreed(self) -> signal.Signals | None:
        """The signal that ends the job, the same for all processes at the same step; or None."""
        return self.signal if self._alone else self._agreed

    def step(self) -> None:
        """Called by all processes after each step."""
        if self._alone:
            return
        noted = np.full(self._local, self.signal or 0, np.int32)
        all_of_them = jax.make_array_from_process_local_data(self._sharding, noted)
        self._answers.append(_greatest(all_of_them))
        if len(self._answers) > self._behind and (number := int(self._answers.popleft())):
            self._agreed = signal.Signals(number)


@jax.jit
def _greatest(numbers: jax.Array) -> jax.Array:
    return jnp.max(numbers)
