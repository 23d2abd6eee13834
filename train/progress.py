"""The one progress bar, and plain lines where there is no terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """A progress bar that goes through phases: data, training, evaluation.

    Without a terminal there is a line every ten seconds instead. All of it goes to standard error,
    or nowhere with `quiet`.

        with Bar() as bar:
            bar.phase("training", 1000)
            bar.update(17, loss="2.31")
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(stderr=True, quiet=quiet)
        self._live = self.console.is_terminal or self.console.is_jupyter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            _Rate(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=None, shown="", visible=False)
        self._description, self._total = "", 0
        self._began = self._said = (0.0, 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, description: str, total: int, completed: int = 0) -> None:
        """Begin something new of `total` equal pieces, of which `completed` are done."""
        self._description, self._total = description, total
        self._began = self._said = (time.monotonic(), completed)
        self._progress.reset(
            self._task,
            description=description,
            total=total,
            completed=completed,
            visible=True,
            shown="",
        )

    def update(self, completed: int, **shown: str) -> None:
        """Say how much is done, and show `shown` beside it from now on."""
        fields = {"shown": "  ".join(f"{k} {v}" for k, v in shown.items())} if shown else {}
        self._progress.update(self._task, completed=completed, **fields)
        now = time.monotonic()
        if not self._live and shown and now - self._said[0] >= _SECONDS_BETWEEN_LINES:
            self._said = (now, completed)
            self.say(self._line(completed, fields["shown"], now))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, completed: int, shown: str, now: float) -> str:
        rate = (completed - self._began[1]) / (now - self._began[0])
        seconds = (self._total - completed) / rate if rate else 0
        left = time.strftime("%H:%M:%S", time.gmtime(seconds))
        return f"{self._description} {completed}/{self._total}  {shown}  {rate:.2f}/s  {left} left"


class _Rate(ProgressColumn):
    """Pieces per second of late."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")
