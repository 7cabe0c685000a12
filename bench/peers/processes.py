"""A server's processes: started in a session of their own, watched, weighed, and ended by id."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.peers.contenders import Contender
from nodeserve.errors import ConnectionLost, ModelError
from nodeserve.loadgen.targets import TargetOptions

START_LIMIT_S = 300.0  # the first start ever of some compiles
STOP_LIMIT_S = 15.0
ASK_EVERY_S = 0.05
TAIL_LINES = 3
MAX_REASON = 300  # characters


class Process(NamedTuple):
    """A process for sure: ids are used again, not together with the time of their start."""

    pid: int
    started: int  # clock ticks after the machine's start

    @property
    def alive(self) -> bool:
        return _status(self.pid)[2] == self.started


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    process: "subprocess.Popen[bytes]"
    options: TargetOptions
    ready_s: float  # from its start to the first answer on its port

    def tree(self) -> list[Process]:
        return tree(self.process.pid)

    def memory_mib(self) -> float:
        """Of all its processes; what they share counts once (PSS)."""
        return sum(map(_pss_kib, self.tree())) / 1024


@contextlib.contextmanager
def running(contender: Contender, folder: Path) -> Iterator[Running]:
    """Start, wait until it answers, and end all of it on the way out.

    ConnectionLost, with the end of its log, where it ends early or never answers.
    """
    if (reason := contender.missing) is not None:
        raise ModelError(reason)
    port, path = free_port(), str(folder / "node.sock")
    log = folder / "server.log"
    began_s = time.perf_counter()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                [word.format(port=port, socket=path) for word in contender.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(contender),
                start_new_session=True,
            )
        except OSError as problem:
            raise ConnectionLost(f"cannot be started: {problem}") from None
    try:
        options = contender.options(port, path)
        wait_for(process, options, log)
        yield Running(process, options, time.perf_counter() - began_s)
    finally:
        end(process)


def environment(contender: Contender) -> dict[str, str]:
    """Ours, less what would lead a peer's Python to our packages."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**(os.environ if contender.ours else inherited), **contender.environment}


def wait_for(process: "subprocess.Popen[bytes]", options: TargetOptions, log: Path) -> None:
    """Until its port answers; ConnectionLost says why it does not."""
    until_s = time.perf_counter() + START_LIMIT_S
    while not answers(options):
        if process.poll() is not None:
            raise ConnectionLost(f"ended with {process.returncode} at its start: {tail(log)}")
        if time.perf_counter() > until_s:
            raise ConnectionLost(f"no answer in {START_LIMIT_S:g} s: {tail(log)}")
        time.sleep(ASK_EVERY_S)


def answers(options: TargetOptions) -> bool:
    """Whether somebody listens there and, over HTTP, knows its models."""
    try:
        if options.url is None:
            assert options.socket is not None
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(options.socket)
            return True
        connection = http.client.HTTPConnection(options.url.removeprefix("http://"), timeout=2.0)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the whole tree to end, and make it after a while."""
    those = tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT_S)
    until_s = time.perf_counter() + STOP_LIMIT_S
    while any(one.alive for one in those) and time.perf_counter() < until_s:
        kill(those)
        process.poll()
        time.sleep(ASK_EVERY_S)


def kill(those: list[Process]) -> None:
    for one in those:
        if one.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)


def tree(pid: int) -> list[Process]:
    """A process, its descendants, and whatever else is of its session."""
    found = {int(name): _status(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    members = {one for one, (_, session, _) in found.items() if one == pid or session == pid}
    grown = True
    while grown:
        more = {one for one, (parent, _, _) in found.items() if parent in members} - members
        members |= more
        grown = bool(more)
    return [Process(one, found[one][2]) for one in sorted(members) if found[one][2]]


def _status(pid: int) -> tuple[int, int, int]:
    """Parent, session, start; zeros where it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0, 0
    fields = text[text.rindex(")") + 2 :].split()
    return (0, 0, 0) if fields[0] in "ZX" else (int(fields[1]), int(fields[3]), int(fields[19]))


def _pss_kib(one: Process) -> int:
    try:
        lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-TAIL_LINES:])[-MAX_REASON:] or "its log is empty"
