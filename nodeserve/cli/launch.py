"""`nodeserve start`: in the foreground, or as a process of its own with `--detach`."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nodeserve.cli.gateway import beside
from nodeserve.cli.progress import StartReport, log_event, start_report
from nodeserve.cli.settings import engine_options, given, read_toml, to_arguments
from nodeserve.config import EngineConfig
from nodeserve.log import set_up
from nodeserve.socket_path import socket_path
from nodeserve.types import StartEvent

LOG_TAIL_LINES = 20
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@click.command()
@click.argument("model_argument", metavar="[MODEL]", required=False)
@engine_options
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with options as keys; the command line wins.",
)
@click.option("--detach", is_flag=True, help="Return when the server is ready, leave it running.")
@click.option("--events-fd", type=int, hidden=True)
def start(
    model_argument: str | None,
    config_file: Path | None,
    detach: bool,
    events_fd: int | None,
    **options: Any,
) -> None:
    """Serve MODEL (a folder, a .gguf file or a hub name) until stopped."""
    config = engine_config(model_argument, config_file, given(options))
    if config.layout == "auto":
        from nodeserve.cli.auto import planned
        from nodeserve.gpus import find_gpus

        config = planned(config, find_gpus().seen_through(os.environ.get(VISIBLE_GPUS)))
    if detach:
        run_detached(config)
        return
    set_up("server", config.log_level, config.log_format)
    painted = events_fd is None and config.log_format == "text"
    report = start_report() if painted else None
    with report or contextlib.nullcontext():
        # Here and not above: no other command needs what this loads.
        from nodeserve.coordinator.server import serve
        from nodeserve.gpus import find_gpus

        on_event = report.on_event if report else event_writer(events_fd)
        with beside(config) as notes:
            for note in notes:
                on_event(StartEvent("note", None, 0, 0, note))
            code = serve(config, on_event, find_gpus().seen_through(os.environ.get(VISIBLE_GPUS)))
    sys.exit(code)


def engine_config(
    model: str | None, config_file: Path | None, options: dict[str, Any]
) -> EngineConfig:
    """Defaults, over them the file, over that the command line; the socket's path is resolved."""
    if model is not None:
        if options.get("model", model) != model:
            raise click.UsageError("MODEL and --model name different models: give one")
        options["model"] = model
    values = {**(read_toml(config_file) if config_file else {}), **options}
    values["socket"] = str(socket_path(values.get("socket"), os.environ, create=True))
    return EngineConfig(**values)


def event_writer(events_fd: int | None) -> Callable[[StartEvent], None]:
    """Logs events, and sends them to the process that started us, if one did; the pipe is closed
    when we are ready."""
    if events_fd is None:
        return log_event
    os.set_inheritable(events_fd, False)
    watched = True

    def write(event: StartEvent) -> None:
        nonlocal watched
        log_event(event)
        if not watched:  # a worker starts again: the descriptor may be somebody else's by now
            return
        with contextlib.suppress(BrokenPipeError):  # nobody watches any more: go on
            os.write(events_fd, json.dumps(asdict(event)).encode() + b"\n")
        if event.phase == "ready":
            watched = False
            os.close(events_fd)

    return write


def run_detached(config: EngineConfig) -> None:
    """Start a server in a session of its own and leave it when it is ready."""
    assert config.socket is not None
    log_path = Path(config.socket).with_suffix(".log")
    with start_report() as report:
        process = start_process(config, log_path, report)
    click.echo(f"{config.socket} pid {process.pid} log {log_path}")


def start_process(
    config: EngineConfig, log_path: Path, report: StartReport
) -> "subprocess.Popen[bytes]":
    """A server that is ready, as a process. When that fails or is interrupted none is left."""
    with open_log(log_path) as log:
        process, events = spawn(config, log)
    try:
        if watch(events, report):
            return process
    except BaseException:
        process.terminate()
        process.wait()
        raise
    code = process.wait()
    raise click.ClickException(
        f"the server ended with code {code} before it was ready; the end of {log_path}:\n"
        + tail(log_path)
    )


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """The log file for this start, readable by its owner only."""
    try:
        # Appended to: the log may belong to a server that still runs here and refuses this one.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise click.ClickException(f"cannot write {path}: {problem.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def spawn(config: EngineConfig, log: int) -> tuple["subprocess.Popen[bytes]", int]:
    """The server's process and the pipe that its events come through."""
    events, events_end = os.pipe()
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "nodeserve", "start"),
                *(*to_arguments(config), f"--events-fd={events_end}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[events_end],
        )
    finally:
        os.close(events_end)
    return process, events


def watch(events: int, report: StartReport) -> bool:
    """Show events until the server is ready (True) or gone (False)."""
    with os.fdopen(events) as lines:
        for line in lines:
            event = StartEvent(**json.loads(line))
            report.on_event(event)
            if event.phase == "ready":
                return True
    return False


def tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])
