"""How a start looks: bars on a terminal, plain lines anywhere else. Always on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import click

from nodeserve.log import about, logger
from nodeserve.types import StartEvent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Painter(Protocol):
    """Where lines and loading go."""

    def line(self, text: str) -> None: ...
    def loading(self, event: StartEvent) -> None: ...
    def close(self) -> None: ...


class StartReport:
    """Turns events into lines with seconds since the start; a `with` block ends the bars.

    Whoever read them may have gone (`nodeserve start 2>&1 | head`): the server goes on.
    """

    def __init__(self, painter: Painter, clock: Callable[[], float] = time.monotonic) -> None:
        self._painter = painter
        self._clock = clock
        self._started_s = clock()

    def __enter__(self) -> "StartReport":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._painter.close()

    def on_event(self, event: StartEvent) -> None:
        with contextlib.suppress(OSError):
            self._show(event)

    def _show(self, event: StartEvent) -> None:
        if event.phase == "loading":
            self._painter.loading(event)
        elif event.phase == "ready":
            self._painter.close()
            self._line(f"ready: {event.message}")
        elif text := _sentence(event):
            self._line(text)

    def _line(self, text: str) -> None:
        self._painter.line(f"[{self._clock() - self._started_s:6.2f} s] {text}")


def log_event(event: StartEvent) -> None:
    """As a line of the log, where nobody watches."""
    text = f"ready: {event.message}" if event.phase == "ready" else _sentence(event)
    if text:
        logger.info("%s", text, extra=about("start", phase=event.phase))


def _sentence(event: StartEvent) -> str:
    match event:
        case StartEvent(phase="model", done=0):
            return f"looking for {event.message}"
        case StartEvent(phase="model"):
            return f"model {event.message}"
        case StartEvent(phase="workers"):
            return f"starting {event.total} worker{'s' if event.total != 1 else ''}"
        case StartEvent(phase="pages"):
            return "workers are loaded and see each other's pages"
        case StartEvent(phase="note"):
            return f"note: {event.message}"
    return ""


class PlainPainter:
    """One line when a worker has finished a phase of its loading."""

    def line(self, text: str) -> None:
        click.echo(text, err=True)

    def loading(self, event: StartEvent) -> None:
        if event.done >= event.total:
            self.line(f"           worker {event.worker}: {event.message} done")

    def close(self) -> None:
        pass


class BarPainter:
    """One bar for each worker."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._bars: dict[int | None, TaskID] = {}

    def line(self, text: str) -> None:
        if self._progress is None:
            click.echo(text, err=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False)

    def loading(self, event: StartEvent) -> None:
        if self._progress is None:
            self._progress = _bars()
            self._progress.start()
        values: dict[str, Any] = {"total": event.total, "phase": event.message}
        if event.worker not in self._bars:
            name = f"worker {event.worker}"
            self._bars[event.worker] = self._progress.add_task(name, **values)
        self._progress.update(self._bars[event.worker], completed=event.done, **values)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("           {task.description}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def start_report() -> StartReport:
    """Bars when somebody watches, lines otherwise."""
    return StartReport(BarPainter() if sys.stderr.isatty() else PlainPainter())
