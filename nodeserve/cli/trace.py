"""`nodeserve trace`: what a running server does, as a picture to look into and as a table."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nodeserve.cli.talk import socket_option
from nodeserve.errors import ConfigError
from nodeserve.socket_path import socket_path

if TYPE_CHECKING:
    from nodeserve.tracing.lanes import Lanes
    from nodeserve.tracing.recording import Recording

SECONDS = 10.0


@click.command()
@socket_option
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.0, min_open=True),
    help=f"Record for so long. [default: {SECONDS:g}; with --requests any time]",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help="Record until so many requests that arrive from now on have ended.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="trace.json",
    show_default=True,
    help="For ui.perfetto.dev or chrome://tracing; compressed if its name ends with .gz.",
)
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also a row for each request, which bench, simulate and plan take as --trace.",
)
def trace(
    socket: str | None,
    seconds: float | None,
    requests: int | None,
    out: Path,
    csv_path: Path | None,
) -> None:
    """Record what a running server does: passes, handoffs and gaps of each worker, the stages of
    each request.

    Ctrl-C ends it early; what was recorded is written. Nothing of any text is in it.
    """
    from nodeserve.tracing.chrome import write_chrome
    from nodeserve.tracing.lanes import lanes_of
    from nodeserve.tracing.recording import record
    from nodeserve.tracing.table import write_csv

    for path in (out, csv_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no such folder")
    if seconds is None and requests is None:
        seconds = SECONDS
    path = socket_path(socket, os.environ)
    recording = asyncio.run(record(path, seconds, requests, lambda: began(seconds, requests)))
    lanes = lanes_of(recording.events)
    write_chrome(out, lanes, {"lost events": recording.lost, **recording.server})
    click.echo(summary(out, lanes))
    if csv_path is not None:
        num_rows, num_left_out = write_csv(csv_path, lanes)
        click.echo(f"{csv_path}: {num_rows} requests{left_out(num_left_out)}")
    for line in complaints(recording):
        click.echo(line, err=True)
    if recording.error is not None:
        raise recording.error


def began(seconds: float | None, requests: int | None) -> None:
    limits = [] if seconds is None else [f"{seconds:g} s"]
    limits += [] if requests is None else [f"{requests} requests"]
    click.echo(f"recording {' or '.join(limits)}; Ctrl-C ends it", err=True)


def summary(out: Path, lanes: "Lanes") -> str:
    passes = sum(len(lane.passes) for lane in lanes.workers.values())
    return (
        f"{out}: {lanes.ended_s - lanes.began_s:.1f} s, {len(lanes.requests)} requests,"
        f" {passes} passes of {len(lanes.workers)} workers; open it in ui.perfetto.dev"
    )


def left_out(count: int) -> str:
    words = "that ended without a token or not within the trace"
    return f"; {count} {words} are left out" if count else ""


def complaints(recording: "Recording") -> list[str]:
    """What is wrong with it."""
    lines = []
    if recording.lost:
        lines.append(f"warning: {recording.lost} events are missing: they came too fast for us")
    if recording.error is None and not recording.over:
        lines.append("warning: the server did not send the end of the trace")
    return lines
