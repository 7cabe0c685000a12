"""Servers as processes, on sockets of their own: what a benchmark of the whole engine drives."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nodeserve import AsyncClient
from nodeserve.cli.launch import start_process, tail
from nodeserve.cli.progress import StartReport
from nodeserve.config import EngineConfig
from nodeserve.types import StartEvent

STOP_LIMIT_S = 15.0


class Silence:
    """Many starts are no news."""

    def line(self, text: str) -> None: ...
    def loading(self, event: StartEvent) -> None: ...
    def close(self) -> None: ...


@contextlib.contextmanager
def running(config: EngineConfig) -> Iterator[Path]:
    """A server with these settings, ready; its socket. Stopped with the block, killed if that
    takes long."""
    with tempfile.TemporaryDirectory(prefix="nodeserve-") as folder:
        socket = Path(folder) / "node.sock"
        config = replace(config, socket=str(socket))
        process = start_process(config, Path(folder) / "log", StartReport(Silence()))
        try:
            yield socket
            asyncio.run(_stop(socket))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT_S)
        except BaseException:
            print(f"the end of the server's log:\n{tail(Path(folder) / 'log')}", file=sys.stderr)
            raise
        finally:
            process.kill()
            process.wait()


async def _stop(socket: Path) -> None:
    async with AsyncClient(socket) as client:
        await client.stop_server()
