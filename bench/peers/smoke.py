"""The harness alone, in seconds: a node on simulated devices and a server with known answers."""

import sys
from pathlib import Path

from bench.peers.contenders import Contender, ours
from bench.peers.life import Protocol
from nodeserve.plan.requests import Source

PROFILE = "llama-3.1-8b-h100"
TTFT_S, TPOT_S = 0.02, 0.002


def smoke() -> tuple[list[Contender], Protocol]:
    """A node, one asked over HTTP, a peer, one that is not there, and how they are measured."""
    node = ours("2m", "G", "--profile", PROFILE, device="sim")
    gateway = ours("2m", "H", "--profile", PROFILE, device="sim", http=True)
    known = Contender(
        name="known answers",
        letter="C",
        bits=16,
        command=(
            *(sys.executable, "-m", "tests.fakes.known_process"),
            *("{port}", str(TTFT_S), str(TPOT_S)),
        ),
    )
    absent = Contender("absent", "A", 16, ("absent",), needs=(Path("/nonexistent/absent"),))
    protocol = Protocol(
        rung_s=0.5,
        settle_s=0.1,
        num_alone=3,
        closed_s=0.2,
        ladder=(20.0, 40.0),
        common_rate=20.0,
        source=Source("synthetic(32,8)"),
    )
    return [node, gateway, known, absent], protocol
