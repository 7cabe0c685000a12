"""The peers' benchmark as a process: servers are started, measured and gone afterwards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers.contenders import Contender
from bench.peers.life import live
from bench.peers.processes import Process, running, tree
from bench.peers.smoke import smoke
from tests.patience import PATIENCE_S

COMMAND = (sys.executable, "-m", "bench.peers", "--smoke")
# A child in another session, which outlives what started it unless it is looked for.
RUNAWAY = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Models(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Models).serve_forever()
"""


def program(text: str) -> Contender:
    return Contender("program", "A", 16, (sys.executable, "-c", text, "{port}"))


@pytest.mark.slow
@pytest.mark.alone
def test_smoke_measures_a_node_its_gateway_and_a_peer_and_says_what_is_missing() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    node, gateway, known, absent = found["servers"]
    assert node["failure"] is gateway["failure"] is known["failure"] is None
    assert "not installed" in absent["failure"] and absent["goodput"] is None
    assert known["rungs"][0]["num_good"] == known["rungs"][0]["num_offered"] > 0
    assert known["alone"]["p50_ttft_ms"] == pytest.approx(20.0, abs=10.0)
    for one in node, gateway, known:
        assert one["short_outputs"] == one["other_prompt_lengths"] == one["failed_requests"] == 0
        assert one["memory_mib"] > 5 and one["tokens_per_s_16_clients"] > 0
    assert [one["what"] for one in found["aims"]][0] == "goodput"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(how: signal.Signals) -> None:
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    those: list[Process] = []
    for line in process.stdout:
        if "answers after" in line:
            those = tree(process.pid)
            process.send_signal(how)
            break
    process.communicate(timeout=PATIENCE_S)
    assert len(those) > 3  # the bench, its client, a node and its workers
    assert not [one for one in those if one.alive]


def test_children_that_left_their_session_are_ended_too(tmp_path: Path) -> None:
    with running(program(RUNAWAY), tmp_path) as server:
        those = server.tree()
        assert len(those) == 2 and server.memory_mib() > 1
        assert os.getpid() not in [one.pid for one in those]
    assert not [one for one in those if one.alive]


def test_a_server_that_ends_at_its_start_is_a_reason(tmp_path: Path) -> None:
    broken = program("import sys; sys.exit('the weights are gone')")
    found = live(broken, smoke()[1], tmp_path, lambda text: None)
    assert found.failure == "ended with 1 at its start: the weights are gone"
    assert found.start_s is None and not found.rungs
