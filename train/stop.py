"""Ending a run in order when someone asks for it: Ctrl-C and SIGTERM."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

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
