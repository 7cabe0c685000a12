"""Keeps gateway processes: starts them, starts one again that ended, ends them."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from socket import socket as Socket

from nodeserve.errors import ConfigError
from nodeserve.gateway.listen import Address, listening
from nodeserve.gateway.settings import SHARED_METERS
from nodeserve.log import about, logger

COMMAND = (sys.executable, "-m", "nodeserve", "gateway")
NEEDED = ("starlette", "uvicorn", "httptools", "prometheus_client")
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 10.0
LASTING_S = 30.0  # one that lived that long is started again at once
KILL_AFTER_S = 5.0  # beyond the time that it may take for running answers


class Keeper:
    """Of one process. Its thread waits for the process's end, so nothing is polled."""

    def __init__(
        self, number: int, listener: Socket, arguments: Sequence[str], meters: Path | None
    ) -> None:
        self.number = number
        self._meters = meters
        self._listener = listener
        self._arguments = arguments
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name=f"gateway-{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_end(self) -> None:
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()

    def wait(self, timeout_s: float) -> None:
        """Until its end, or kill it."""
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self._process is not None:
            extra = about("gateway_killed", gateway=self.number)
            words = "gateway %d did not end in %g s and is killed"
            logger.warning(words, self.number, timeout_s, extra=extra)
            self._process.kill()
            self._thread.join()

    def _keep(self) -> None:
        delay_s = FIRST_DELAY_S
        while not self._stopping.is_set():
            try:
                process = self._spawn()
            except OSError as problem:  # too many processes or descriptors: that may pass
                extra = about("gateway_not_started", gateway=self.number)
                words = "gateway %d cannot be started, again in %g s: %s"
                logger.error(words, self.number, delay_s, problem.strerror, extra=extra)
                self._stopping.wait(delay_s)
                delay_s = min(2 * delay_s, MAX_DELAY_S)
                continue
            if process is None:
                return
            began_s = time.monotonic()
            code = process.wait()
            assert process.stdin is not None
            process.stdin.close()
            self._forget_open(process.pid)
            if self._stopping.is_set():
                return
            if time.monotonic() - began_s > LASTING_S:
                delay_s = FIRST_DELAY_S
            logger.error(
                "gateway %d (pid %d) %s and starts again in %g s",
                *(self.number, process.pid, how_it_ended(code), delay_s),
                extra=about("gateway_restarts", gateway=self.number, exit_code=code),
            )
            self._stopping.wait(delay_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)

    def _spawn(self) -> "subprocess.Popen[bytes] | None":
        """None once it is to end."""
        with self._lock:
            if self._stopping.is_set():
                return None
            descriptor = self._listener.fileno()
            self._process = subprocess.Popen(
                [*COMMAND, f"--http-fd={descriptor}", *self._arguments],
                stdin=subprocess.PIPE,
                pass_fds=[descriptor],
                env=self._environment(),
                process_group=0,  # Ctrl-C is for whoever keeps it
            )
            return self._process

    def _environment(self) -> dict[str, str] | None:
        return None if self._meters is None else {**os.environ, SHARED_METERS: str(self._meters)}

    def _forget_open(self, pid: int) -> None:
        """Its counts stay, what it had open is no more."""
        if self._meters is not None:
            for path in self._meters.glob(f"gauge_live*_{pid}.db"):
                path.unlink()


def how_it_ended(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


def check_installed() -> None:
    """ConfigError where the packages that only gateways need are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"a gateway needs the package {missing[0]}: pip install 'nodeserve[http]'"
        )


@contextlib.contextmanager
def shared_meters(count: int) -> Iterator[Path | None]:
    """The folder through which several processes count together; one alone needs none."""
    if count == 1:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nodeserve-meters-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def kept(
    address: Address, count: int, arguments: Sequence[str], stop_timeout_s: float
) -> Iterator[Address]:
    """`count` gateways on an address, as long as the block runs; yields it with its real port.

    `arguments` are those of `nodeserve gateway`, less the address. ConfigError when nobody can
    listen there.
    """
    check_installed()
    with listening(address, count) as (real, sockets), shared_meters(count) as meters:
        keepers = [Keeper(number, one, arguments, meters) for number, one in enumerate(sockets)]
        for keeper in keepers:
            keeper.start()
        try:
            yield real
        finally:
            for keeper in keepers:
                keeper.ask_to_end()
            for keeper in keepers:
                keeper.wait(stop_timeout_s + KILL_AFTER_S)
