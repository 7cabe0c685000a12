"""`nodeserve doctor` on this machine, and a self-test that is cut short."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeserve.cli.doctor import selftest
from nodeserve.cli.doctor.selftest import SilentPainter, killed_after, run
from nodeserve.cli.launch import spawn
from nodeserve.cli.progress import StartReport
from nodeserve.config import EngineConfig
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.slow
DOCTOR = [sys.executable, "-m", "nodeserve", "doctor"]


def test_this_machine_as_json(tmp_path: Path) -> None:
    environment = {**os.environ, "NODESERVE_SOCKET": str(tmp_path / "node.sock")}
    done = subprocess.run(
        [*DOCTOR, "--json", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment,
    )
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    assert done.returncode == 0, [x for x in told["findings"] if x["mark"] == "problem"]
    assert told["runs"].startswith("CPU workers: native ")
    assert told["software"]["torch"] is not None
    assert told["software"]["native"] is not None
    # Where the extension is built and no driver answers, it cannot count its devices.
    assert set(told["software"]["failures"]) <= {"extension"}
    assert told["machine"]["cores"] == sorted(os.sched_getaffinity(0))
    assert told["socket"]["path"] == str(tmp_path / "node.sock")


def config(folder: Path, model: str) -> EngineConfig:
    return EngineConfig(model=model, layout="1m", socket=str(folder / "node.sock"))


def spawn_stopped(config: EngineConfig, log: int) -> tuple["subprocess.Popen[bytes]", int]:
    process, events = spawn(config, log)
    process.send_signal(signal.SIGSTOP)
    return process, events


def test_a_server_that_hangs_is_ended_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "spawn", spawn_stopped)
    before = children()  # other tests may have left a helper of Python's own
    done = run(config(tmp_path, "/no/such/model"), StartReport(SilentPainter()), timeout_s=0.5)
    assert done.error == "took more than 0.5 s and was ended"
    assert done.left_behind == []
    assert children() == before


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    before = children()  # other tests may have left a helper of Python's own
    done = run(config(tmp_path, "/no/such/model"), StartReport(SilentPainter()))
    assert done.error is not None
    assert done.error.startswith("the server ended before it was ready: no model at /no/such/model")
    assert children() == before


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """Deaf to SIGTERM, in a session of its own."""
    script = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True);"
        "signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_server_deaf_to_requests_is_killed(
    sleeper: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "STOP_TIMEOUT_S", 0.2)
    selftest.end(sleeper)
    assert sleeper.returncode == -signal.SIGKILL


def test_a_deadline_kills_what_runs(sleeper: "subprocess.Popen[bytes]") -> None:
    with killed_after(sleeper, 0.1) as late:
        assert sleeper.wait(PATIENCE_S) == -signal.SIGKILL
    assert late.is_set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_selftest_that_is_interrupted_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [*DOCTOR, "--selftest", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "starting 1 worker" in line:
            break
    servers = children(process.pid)
    assert len(servers) == 1
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (1, 128 + signal.SIGTERM)
    assert not Path(f"/proc/{servers[0]}").exists()
    assert not list(tmp_path.glob("nodeserve-doctor-*"))
    assert not list(Path("/dev/shm").glob(f"*nodeserve-{servers[0]}-*"))


def children(pid: int | None = None) -> list[int]:
    pid = pid or os.getpid()
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
