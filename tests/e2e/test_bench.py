"""`nodeserve bench` against a node of simulated GPUs, through its real socket."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import served

NODE = {"device": "sim", "profile": "llama-3.1-8b-h100", "layout": "1p1d"}
# Other tests may keep the machine busy: these ask whether it works, not whether it was in time.
PATIENT = ("--max-late", "1000", "--json")


def bench(socket: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "nodeserve", "bench", "--socket", str(socket)]
    done = subprocess.run(
        [*command, *PATIENT, *arguments], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


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
