"""`nodeserve start` when it cannot: no server is left, and the reason is shown."""

import signal
import subprocess
import sys
from pathlib import Path

from nodeserve.cli.doctor.selftest import write_tiny_model
from tests.patience import PATIENCE_S

START = [sys.executable, "-m", "nodeserve", "start"]


def test_a_detached_start_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    socket = tmp_path / "node.sock"
    done = subprocess.run(
        [*START, "/no/such/model", "--detach", "--socket", str(socket)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ended with code 1 before it was ready" in done.stderr
    assert "no model at /no/such/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "node.log").stat().st_mode & 0o777 == 0o600
    assert not socket.exists()


def test_an_interrupted_detached_start_ends_the_server(tmp_path: Path) -> None:
    model, socket = write_tiny_model(tmp_path / "tiny"), tmp_path / "node.sock"
    process = subprocess.Popen(
        [*START, str(model), "--load-format", "dummy", "--detach", "--socket", str(socket)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "looking for" in process.stderr.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert not Path(f"/proc/{children[0]}").exists()
