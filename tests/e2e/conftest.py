"""Real nodes: the command line, CPU workers, the embedded model."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S


def arguments(settings: dict[str, Any]) -> list[str]:
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]


@contextlib.contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Path]:
    """`nodeserve start` with these settings; yields the socket once it is ready."""
    socket = folder / "node.sock"
    model = settings.pop("model", None)
    command = [sys.executable, "-m", "nodeserve", "start", *([model] if model else [])]
    process = subprocess.Popen(
        [*command, "--socket", str(socket), *arguments(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _until_ready(process)
        yield socket
        process.send_signal(signal.SIGTERM)
        words, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, words
        assert not socket.exists()
        assert not [n for n in os.listdir("/dev/shm") if f"nodeserve-{process.pid}-" in n]
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "ready" in line:
            return
    raise AssertionError(f"the node did not start:\n{''.join(lines)}")


@pytest.fixture
def node_folder(tmp_path: Path) -> Path:
    return tmp_path
