"""A gateway and a node as its /openapi.json has them: schemathesis asks whatever it describes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nodeserve.gateway.openapi import OPERATIONS
from tests.fakes.gguf_writer import gpt2_metadata, write_gguf
from tests.process.conftest import Nodes, RunningNode, StartGateways

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
# Fields may exclude each other, which no schema says: what is taken is looked at in
# tests/unit/test_gateway_openapi.py.
NOT_CHECKED = "positive_data_acceptance"
KEY = "only-a-test"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    metadata = gpt2_metadata(**{"tokenizer.chat_template": TEMPLATE})
    return write_gguf(tmp_path / "model.gguf", metadata)


@pytest.fixture
def text_node(nodes: Nodes, tokenizer: Path) -> RunningNode:
    """Answers are short: most that is asked has no limit of tokens."""
    return nodes.start(layout="1p1d", device="sim", tokenizer=str(tokenizer), max_model_len=48)


def ask_everything(url: str, folder: Path, *options: str) -> dict[str, Any]:
    """The report of a run, in which nothing was wrong."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    command += ["--exclude-checks", NOT_CHECKED, "--phases", "examples,coverage,fuzzing"]
    command += ["--suppress-health-check", "all", "--seed", "1", "--max-examples", "25"]
    command += ["--request-timeout", "20", "--warnings", "off", "--no-shrink"]
    command += ["--report", "json", "--report-json-path", str(report), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    operations = found["operations"]
    assert found["complete"] and operations["tested"] == operations["total"], found
    assert operations["total"] == len(OPERATIONS) - 1, "all but the document itself"
    return found


@pytest.mark.slow
def test_what_is_described_is_what_is_done(start_gateways: StartGateways, tmp_path: Path) -> None:
    """No 5xx, no status that is not described, no answer of another form, nothing taken that
    should be refused."""
    found = ask_everything(start_gateways().url, tmp_path)
    assert found["test_cases"]["generated"] > 1000


@pytest.mark.slow
def test_keys_are_described(start_gateways: StartGateways, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    url = start_gateways("--api-key-file", str(keys)).url
    header = ("--header", f"Authorization: Bearer {KEY}", "--checks", "ignored_auth")
    ask_everything(url, tmp_path, *header, "--phases", "fuzzing", "--max-examples", "3")
