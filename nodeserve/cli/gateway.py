"""`nodeserve gateway`: OpenAI's HTTP API beside a running server; and for `start --http`."""

import contextlib
import os
import signal
import socket as socketlib
import threading
from collections.abc import Iterator
from pathlib import Path

import click

from nodeserve.cli.settings import ENGINE_HELP, ByteSize
from nodeserve.cli.talk import socket_option
from nodeserve.config import EngineConfig
from nodeserve.errors import ConfigError
from nodeserve.gateway.keeper import kept
from nodeserve.gateway.listen import Address, parse_address
from nodeserve.gateway.settings import (
    MAX_BODY_BYTES,
    STOP_TIMEOUT_S,
    TOOL_CALL_PARSERS,
    GatewaySettings,
    read_keys,
)
from nodeserve.log import logger, set_up
from nodeserve.socket_path import socket_path

API_KEY = "NODESERVE_API_KEY"
STOP_S = 5  # once the server is gone there is nothing left but to say so


@click.command()
@click.option("--http", help="HOST:PORT or unix:PATH to listen on.", default="127.0.0.1:8000")
@socket_option
@click.option("--workers", type=click.IntRange(min=1), default=1, help="Processes that share it.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"Keys, one on each line; ${API_KEY} is one more. Without any everybody may ask.",
)
@click.option(
    "--max-body", type=ByteSize(), default=MAX_BODY_BYTES, help="Of a request, such as 16MiB."
)
@click.option("--cors-origin", multiple=True, help="Whose pages may ask, such as https://a.example")
@click.option(
    "--stop-timeout", type=int, default=STOP_TIMEOUT_S, help="Seconds for running answers."
)
@click.option("--log-level", default="info", show_default=True, help=ENGINE_HELP["log_level"])
@click.option("--log-format", default="text", show_default=True, help=ENGINE_HELP["log_format"])
@click.option(
    "--tool-call-parser",
    type=click.Choice(TOOL_CALL_PARSERS),
    help="How the model writes calls of functions; by default its chat template says it.",
)
@click.option("--http-fd", type=int, hidden=True)
def gateway(
    http: str,
    socket: str | None,
    workers: int,
    api_key_file: Path | None,
    max_body: int,
    cors_origin: tuple[str, ...],
    stop_timeout: int,
    log_level: str,
    log_format: str,
    tool_call_parser: str | None,
    http_fd: int | None,
) -> None:
    """Serve OpenAI's HTTP API for a running server."""
    set_up("gateway", log_level, log_format)
    settings = GatewaySettings(
        socket=str(socket_path(socket, os.environ)),
        api_keys=read_keys(api_key_file, os.environ.get(API_KEY)),
        max_body_bytes=max_body,
        cors_origins=cors_origin,
        stop_timeout_s=stop_timeout,
        tool_call_parser=tool_call_parser,
    )
    if http_fd is not None:
        from nodeserve.gateway.serve import serve

        with socketlib.socket(fileno=http_fd) as listener:
            serve(listener, settings)
        return
    arguments = [
        *(
            f"--socket={settings.socket}",
            f"--max-body={max_body}",
            f"--stop-timeout={stop_timeout}",
        ),
        *(f"--log-level={log_level}", f"--log-format={log_format}"),
        *(f"--cors-origin={origin}" for origin in cors_origin),
        *([] if api_key_file is None else [f"--api-key-file={api_key_file.absolute()}"]),
        *([] if tool_call_parser is None else [f"--tool-call-parser={tool_call_parser}"]),
    ]
    with kept(parse_address(http), workers, arguments, stop_timeout) as address:
        for line in words(address, bool(settings.api_keys)):
            logger.info(line) if log_format == "json" else click.echo(line, err=True)
        until_signalled()


def words(address: Address, has_keys: bool) -> list[str]:
    """What people should know of it."""
    lines = [f"serving {address}"]
    if not (has_keys or address.private):
        lines.append(f"note: whoever reaches {address} may ask; --api-key-file lets in fewer")
    return lines


def until_signalled() -> None:
    """Sleep until SIGINT or SIGTERM."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    told.wait()


@contextlib.contextmanager
def beside(config: EngineConfig) -> Iterator[list[str]]:
    """The gateways that `start --http` asks for, while the block runs; what to say of them.

    They are there before the model is, so that a bad address shows at once, and answer 503 until
    the server is ready.
    """
    if config.http is None:
        for name in ("http_workers", "api_key_file", "tool_call_parser"):
            if getattr(config, name) != getattr(EngineConfig(), name):
                raise ConfigError(f"--{name.replace('_', '-')} is for gateways: give --http too")
        yield []
        return
    if config.http_workers < 1:
        raise ConfigError(f"--http-workers {config.http_workers}: at least 1 is needed")
    path = None if config.api_key_file is None else Path(config.api_key_file)
    keys = read_keys(path, os.environ.get(API_KEY))
    arguments = [f"--socket={config.socket}", f"--stop-timeout={STOP_S}"]
    arguments += [f"--log-level={config.log_level}", f"--log-format={config.log_format}"]
    arguments += [] if path is None else [f"--api-key-file={path.absolute()}"]
    if (style := config.tool_call_parser) is not None:
        if style not in TOOL_CALL_PARSERS:
            raise ConfigError(
                f"--tool-call-parser {style!r}: use one of {', '.join(TOOL_CALL_PARSERS)}"
            )
        arguments.append(f"--tool-call-parser={style}")
    with kept(parse_address(config.http), config.http_workers, arguments, STOP_S) as address:
        yield words(address, bool(keys))
