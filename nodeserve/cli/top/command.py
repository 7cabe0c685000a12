"""`nodeserve top`."""

import asyncio
import contextlib
import sys

import click

from nodeserve.cli.talk import CONNECT_TIMEOUT_S, socket_option

WIDTH = 100  # of a file or a pipe


@click.command()
@socket_option
@click.option("--once", is_flag=True, help="Print one frame and end; so it is without a terminal.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 60.0),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
def top(socket: str | None, once: bool, interval_s: float) -> None:
    """Watch goodput, what limits it, and every worker.

    Keys: q quits, p pauses, s sorts by the next column, r reverses, up and down scroll.
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(watch(socket, once or not is_terminal(), interval_s))


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


async def watch(socket: str | None, once: bool, interval_s: float) -> None:
    """Until the person quits; one frame with `once`."""
    from rich.console import Console

    from nodeserve.cli.top import live
    from nodeserve.client import AsyncClient

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    async with AsyncClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S) as client:
        if once:
            await live.once(client, console, interval_s)
        else:
            await live.View(client, console, interval_s).run()
