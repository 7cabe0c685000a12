"""The command line as a person uses it, with the embedded model."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeserve import Client
from tests.patience import PATIENCE_S

Done = subprocess.CompletedProcess[str]


def command(socket: Path, *arguments: str, stdin: str = "", check: bool = True) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "nodeserve", *arguments, "--socket", str(socket)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A detached server's socket and pid."""
    socket = tmp_path_factory.mktemp("cli") / "node.sock"
    started = command(socket, "start", "--detach", "--layout", "1p1d", "--max-model-len", "512")
    path, _, pid = started.stdout.split()[:3]
    assert path == str(socket)
    assert "ready" in started.stderr and "worker 1: weights done" in started.stderr
    try:
        yield socket, int(pid)
    finally:
        if socket.exists():
            os.kill(int(pid), signal.SIGTERM)


def test_a_detached_server_from_start_to_stop(node: tuple[Path, int]) -> None:
    socket, pid = node
    assert socket.stat().st_mode & 0o777 == 0o600
    assert os.getsid(pid) == pid
    greedy = ["--temperature", "0", "--max-tokens", "4"]

    streamed = command(socket, "complete", "The capital of France is", *greedy)
    assert streamed.stdout.startswith(" Paris")
    as_json = command(socket, "complete", "The capital of France is", *greedy, "--json")
    assert json.loads(as_json.stdout)["text"] + "\n" == streamed.stdout
    talk = command(socket, "chat", *greedy, stdin="Say hello.\nAnd again.\n")
    assert len(talk.stdout.splitlines()) >= 2

    status = json.loads(command(socket, "status", "--json").stdout)
    assert status["requests"]["finished"] == 4
    assert [worker["role"] for worker in status["workers"]] == ["prefill", "decode"]
    assert status["workers"][1]["handoffs"] == 4
    assert "1p1d" in command(socket, "status").stdout

    second = command(socket, "start", check=False)
    assert second.returncode == 1
    assert "already running" in second.stderr

    command(socket, "stop")
    assert not socket.exists()
    pids = [pid, *(worker["pid"] for worker in status["workers"])]
    assert not [p for p in pids if running(p)]
    assert not list(Path("/dev/shm").glob(f"*nodeserve-{pid}-*"))
    gone = command(socket, "status", check=False)
    assert gone.returncode == 1 and "no server on" in gone.stderr


def running(pid: int) -> bool:
    """False also for a process that has ended and that nobody has asked about yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_stop_drains_and_signals_stop_in_the_foreground(tmp_path: Path) -> None:
    socket = tmp_path / "node.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "nodeserve", "start", "--layout", "1m", "--socket", str(socket)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "ready:" in line:
            break
    with Client(socket) as client:
        stream = client.generate([1, 2], max_tokens=40, ignore_eos=True, stream=True)
        next(stream)
        stop = subprocess.Popen(
            [sys.executable, "-m", "nodeserve", "stop", "--drain", "--socket", str(socket)],
            stdout=subprocess.PIPE,
        )
        *_, last = stream
        assert last.usage is not None and last.usage.completion_tokens == 40
    assert stop.wait(PATIENCE_S) == 0
    assert process.wait(PATIENCE_S) == 0
    process.stderr.close()
    assert stop.stdout is not None
    stop.stdout.close()
