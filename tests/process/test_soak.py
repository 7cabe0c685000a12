"""The soak itself, for as long as a test may take: everything at once, and nothing wrong."""

import json
import subprocess
import sys

import pytest

from bench.soak.traffic import KINDS
from tests.patience import PATIENCE_S


@pytest.mark.slow
def test_twenty_seconds_of_everything() -> None:
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.33", "--kills", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == [] and done.returncode == 0
    counts = found["counts"]
    assert set(KINDS) <= set(counts), "in 400 requests each kind comes"
    assert found["answers"] > 100 and found["tokens"] > 1000
    assert counts["ended: cancelled"] and counts["ended: invalid_request"] and counts["left"]
    assert found["kills"] and counts["audits"]
