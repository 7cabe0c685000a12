"""`nodeserve bench` against a node of simulated GPUs, through its real socket."""

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nodeserve.blame import BUFFER, DEVICE_WAIT
from nodeserve.types import Timings
from tests.e2e.conftest import served
from tests.fakes.gateway_process import COMMAND, Gateways
from tests.patience import PATIENCE_S

NODE = {"device": "sim", "profile": "llama-3.1-8b-h100", "layout": "1p1d"}
# Other tests may keep the machine busy: these ask whether it works, not whether it was in time.
PATIENT = ("--max-late", "1000", "--json")


def bench(server: Path | str, *arguments: str) -> dict[str, Any]:
    """Its JSON, for a socket or a URL."""
    where = "--url" if isinstance(server, str) else "--socket"
    command = [sys.executable, "-m", "nodeserve", "bench", where, str(server)]
    done = subprocess.run(
        [*command, *PATIENT, *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@contextlib.contextmanager
def gateway(socket: Path) -> Iterator[str]:
    """A gateway process in front of a node; yields its URL."""
    command = [*COMMAND, "--socket", str(socket)]
    started = Gateways(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    try:
        yield started.url
    finally:
        started.process.terminate()
        started.process.communicate(timeout=PATIENCE_S)


def test_rates_and_a_search(node_folder: Path) -> None:
    load = ("--workload", "synthetic(200,4)", "--requests", "60")
    with served(node_folder, **NODE) as socket:
        saved = node_folder / "out" / "bench.json"
        easy = ("--goodput", "ttft:5000", "tpot:1000")
        told = bench(socket, *load, *easy, "--sweep", "20,60", "--save", str(saved), "--details")
        assert [one["request_rate"] for one in told["runs"]] == [20.0, 60.0]
        for run in told["runs"]:
            assert run["completed"] == 60 and run["attainment"] == 1.0 and run["valid"]
            assert run["total_output_tokens"] == 240 and run["other_prompt_lengths"] == 0
            assert run["requests"]["cv"] > 0.5 and 0 < run["p50_ttft_ms"] < run["p99_e2el_ms"]
            assert len(run["ttfts"]) == 60 and run["timings"][0]["decode_worker"] == 1
        assert told["num_workers"] == 2 and json.loads(saved.read_text()) == told

        hard = (
            "--goodput",
            "ttft:0.001",
            "--rate",
            "40",
            "--max-requests",
            "60",
            "--min-rate",
            "20",
        )
        none = bench(socket, *load, *hard, "--find-goodput")
        assert none["search"]["goodput"] == 0.0 and none["search"]["reason"] == "low"
        assert none["runs"][0]["attainment"] == 0.0
        assert sum(none["runs"][0]["blame"].values()) == none["runs"][0]["num_prompts"]


def test_a_gateway_says_what_misses_are_to_blame_on(node_folder: Path) -> None:
    """More prompts than one worker can prefill: they wait for it, also as HTTP shows it."""
    load = ("--workload", "synthetic(2000,4)", "--rate", "60", "--requests", "90")
    with served(node_folder, **NODE) as socket, gateway(socket) as url:
        told = bench(url, *load, "--goodput", "ttft:150", "--details")
        (run,) = told["runs"]
        assert told["backend"] == "openai" and run["completed"] == 90 and told["num_workers"] == 2
        num_missed = sum(run["missed"].values())
        assert num_missed > 30 and sum(run["blame"].values()) == num_missed
        assert max(run["blame"], key=run["blame"].get) in (BUFFER, DEVICE_WAIT)
        assert Counter(filter(None, run["blames"])) == run["blame"]
        for ttft_s, timings in zip(run["ttfts"], run["timings"], strict=True):
            assert timings["prefill_worker"] == 0 and timings["decode_worker"] == 1
            assert timings["prefill_s"] > 0.0 and Timings(**timings).ttft_s < ttft_s
