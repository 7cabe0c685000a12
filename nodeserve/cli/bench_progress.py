"""What a benchmark shows while it runs: one line that changes on a terminal, plain lines elsewhere.
Always on stderr."""

import sys
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.status import Status

    from nodeserve.loadgen.bench import Live, Result

PLAIN_S = 10.0  # between lines where nobody watches


class Progress:
    """`with Progress() as progress`; the line is gone at the end."""

    def __init__(self, watched: bool | None = None) -> None:
        self._watched = sys.stderr.isatty() if watched is None else watched
        self._status: Status | None = None
        self._next_s = time.perf_counter() + PLAIN_S

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, text: str) -> None:
        """What goes on now."""
        if self._watched:
            self._line().update(text)
        else:
            click.echo(text, err=True)

    def on_news(self, live: "Live") -> None:
        now_s = time.perf_counter()
        if self._watched:
            self._line().update(live_line(live, now_s))
        elif now_s >= self._next_s:
            self._next_s = now_s + PLAIN_S
            click.echo(live_line(live, now_s), err=True)

    def result(self, result: "Result") -> None:
        """A run that is over, in a line that stays."""
        text = result_line(result)
        if self._status is not None:
            self._status.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _line(self) -> "Status":
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status("")
            self._status.start()
        return self._status


def live_line(live: "Live", now_s: float) -> str:
    """A run so far."""
    rate = "" if live.rate is None else f"{live.rate:.3g}/s  "
    seconds = max(0.0, now_s - live.began_s)
    good = f"{live.num_good / live.num_ended:.0%} good" if live.num_ended else "none back yet"
    running = max(0, live.num_due(now_s) - live.num_ended) if live.rate is not None else None
    parts = [f"{rate}{seconds:.0f} s", f"{live.num_ended} of {live.num_requests} ended", good]
    if running is not None:
        parts.insert(1, f"{running} running")
    return "  ".join(parts)


def result_line(result: "Result") -> str:
    report = result.report
    rate = "" if result.rate is None else f"{result.rate:.3g}/s: "
    cut = ", cut" if result.given_up else ""
    invalid = "" if report.punctuality.valid else "  INVALID"
    tally = report.tally
    return f"{rate}{tally.num_good} of {tally.num_offered} good, {tally.share:.1%}{cut}{invalid}"
