"""`nodeserve top` on a real terminal of 80x24 (tmux), beside a node of simulated GPUs."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.conftest import Connect, Nodes, RunningNode
from tests.process.test_goodput_stats import LOOSE, submit

needs_tmux = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux")
Predicate = Callable[[list[str]], object]


class Terminal:
    """A tmux server of its own, with one window in which a command runs."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self._socket = folder / "tmux.sock"
        environment = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "TMUX": ""}
        arguments = ["new-session", "-d", "-x", "80", "-y", "24", *command]
        subprocess.run(
            ["tmux", "-S", str(self._socket), "-f", "/dev/null", "-u", *arguments],
            check=True,
            env=environment,
        )

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self._socket), "-u", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def lines(self) -> list[str]:
        """What is to be seen."""
        return self.tmux("capture-pane", "-p").splitlines()

    def until(self, seen: Predicate) -> list[str]:
        """The picture, once it is so; the test's timeout bounds it."""
        while not seen(lines := self.lines()):
            pass
        return lines

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    @property
    def open(self) -> bool:
        command = ["tmux", "-S", str(self._socket), "has-session"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def close(self) -> None:
        if self.open:
            self.tmux("kill-server")


@pytest.fixture
def node(nodes: Nodes) -> RunningNode:
    return nodes.start(layout="2p2d", device="sim", slo="ttft=60s,tpot=60s")


@pytest.fixture
def terminal(tmp_path: Path, node: RunningNode) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "nodeserve", "top", "--interval", "0.2"]
    shell = [
        "sh",
        "-c",
        'trap : INT; before=$(stty -g); "$@"; test "$before" = "$(stty -g)" && exec cat',
        "-",
    ]
    opened = Terminal(tmp_path, [*shell, *command, "--socket", str(node.socket)])
    yield opened
    opened.close()


def sorted_by(name: str) -> Predicate:
    return lambda lines: len(lines) == 24 and f"s sort: {name} " in lines[23]


@needs_tmux
@pytest.mark.slow
async def test_the_view_follows_the_node_and_its_keys(
    node: RunningNode, terminal: Terminal, connect: Connect
) -> None:
    lines = terminal.until(lambda lines: len(lines) == 24 and lines[23].startswith("q quit"))
    assert lines[0].startswith("fake  2p2d  up 0:00:") and lines[0].endswith(" ready")
    assert lines[1] == "idle"
    assert [line[:11].rstrip() for line in lines[14:18]] == [
        *("w0  prefill", "w1  prefill", "w2  decode", "w3  decode")
    ]
    client = await connect(node)
    for number in range(12):
        submit(client, number, LOOSE)
    await client.finish(*range(12))
    lines = terminal.until(lambda lines: lines[1].startswith("all 12 requests met their SLO"))
    assert lines[4].split()[:4] == ["attainment", "100%", "100%", "100%"]
    terminal.press("s")
    terminal.until(sorted_by("role"))
    terminal.press("p")
    lines = terminal.until(lambda lines: lines[0].endswith(" paused"))
    submit(client, 20, {**LOOSE, "tpot_ms": 0.001})
    await client.finish(20)
    terminal.press("s")
    assert terminal.until(sorted_by("batch"))[1] == lines[1], "it stands still"
    terminal.press("p")
    terminal.until(lambda lines: "92% met their SLO" in lines[1])
    terminal.tmux("resize-window", "-x", "60", "-y", "18")
    terminal.until(lambda lines: len(lines) == 18 and lines[17].startswith("q quit"))
    terminal.press("q")
    terminal.until(lambda lines: not any(lines))  # as it was before, for the shell that follows
    assert terminal.open, "the terminal's modes were given back"


@needs_tmux
@pytest.mark.slow
def test_a_node_that_goes_is_told_and_waited_for(
    node: RunningNode, terminal: Terminal, nodes: Nodes
) -> None:
    terminal.until(lambda lines: len(lines) == 24 and lines[1] == "idle")
    os.kill(node.pid, signal.SIGTERM)
    node.wait()
    lines = terminal.until(lambda lines: lines[1] != "idle" and "w3" in "".join(lines))
    assert lines[14].startswith("w0"), "the last picture stays"
    nodes.start(layout="1p1d", device="sim", socket=node.socket)
    terminal.until(lambda lines: "1p1d" in lines[0] and lines[1] == "idle")
    terminal.press("C-c")
    terminal.until(lambda lines: not any(lines))
