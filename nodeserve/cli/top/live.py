"""The live view: asks the server, draws, and listens to keys, all in one event loop."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live

from nodeserve.cli.top.screen import Choice, lines_of, plain
from nodeserve.client import AsyncClient
from nodeserve.errors import NodeServeError
from nodeserve.views import Frame, History

ANSWER_TIMEOUT_S = 3.0
MAX_KEY_BYTES = 64
QUIT = ("q", "Q", "\x1b")
ENDS = (signal.SIGTERM, signal.SIGHUP)  # the terminal is given back before
ARROWS = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down"}


async def once(client: AsyncClient, console: Console, interval_s: float) -> None:
    """Print one frame: of two answers, since shares of time need two."""
    history = History()
    history.add(await client.stats())
    await asyncio.sleep(interval_s)
    frame = history.add(await client.stats())
    lines = lines_of(frame, Choice(), console.width, None)
    if not has_utf8(console):
        plain(lines)
    for line in lines:
        console.print(line, no_wrap=True, crop=True)


class View:
    """One terminal with its view; `run` returns when the person has seen enough."""

    def __init__(self, client: AsyncClient, console: Console, interval_s: float) -> None:
        self._client = client
        self._console = console
        self._interval_s = interval_s
        self._history = History()
        self._frame: Frame | None = None
        self._choice = Choice()
        self._trouble = ""
        self._done = asyncio.Event()

    async def run(self) -> None:
        """The first answer has to come; NodeServeError if it does not."""
        self._frame = self._history.add(await self._client.stats())
        loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()
        with (
            single_keys(stdin),
            Live(console=self._console, screen=True, auto_refresh=False) as self._live,
        ):
            loop.add_reader(stdin, self._on_keys, stdin)
            loop.add_signal_handler(signal.SIGWINCH, self._draw)
            for end in ENDS:
                loop.add_signal_handler(end, self._done.set)
            asking = asyncio.create_task(self._ask())
            try:
                self._draw()
                await self._done.wait()
            finally:
                asking.cancel()
                for one in (signal.SIGWINCH, *ENDS):
                    loop.remove_signal_handler(one)
                loop.remove_reader(stdin)

    async def _ask(self) -> None:
        """Again and again, also while nobody answers."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                stats = await asyncio.wait_for(self._client.stats(), ANSWER_TIMEOUT_S)
            except TimeoutError:
                self._trouble = f"no answer from the server for {ANSWER_TIMEOUT_S:g} s"
            except NodeServeError as error:
                self._trouble = str(error)
            else:
                self._trouble = ""
                frame = self._history.add(stats)
                if not self._choice.paused:
                    self._frame = frame
            self._draw()

    def _on_keys(self, stdin: int) -> None:
        assert self._frame is not None
        data = os.read(stdin, MAX_KEY_BYTES)
        for key in keys_of(data.decode(errors="replace")):
            shown = self._choice.after(key)
            self._choice = shown.within(len(self._frame.workers), self._console.height)
            if key in QUIT:
                self._done.set()
        if not data:  # the terminal is gone
            self._done.set()
        self._draw()

    def _draw(self) -> None:
        assert self._frame is not None
        width, height = self._console.size
        lines = lines_of(self._frame, self._choice, width, height, self._trouble)
        if not has_utf8(self._console):
            plain(lines)
        self._live.update(Group(*lines), refresh=True)


def keys_of(typed: str) -> Iterator[str]:
    """What was typed, an arrow as one key."""
    while typed:
        size = 3 if typed[:3] in ARROWS else 1
        yield ARROWS.get(typed[:3], typed[:1])
        typed = typed[size:]


def has_utf8(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


@contextlib.contextmanager
def single_keys(terminal: int) -> Iterator[None]:
    """Keys come one by one and are not shown; as it was, at the end."""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
