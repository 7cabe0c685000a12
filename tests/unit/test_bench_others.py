"""Processor time of the rest of the machine."""

import subprocess
import sys

from bench.others import Spent, foreign_share, spent

BURN = "import time\nwhile time.process_time() < 0.3: pass"


def test_what_is_busy_and_not_ours_is_foreign() -> None:
    before = Spent(total_s=100.0, busy_s=40.0, ours_s=10.0)
    assert foreign_share(before, Spent(120.0, 52.0, 20.0)) == 0.1
    assert foreign_share(before, Spent(120.0, 49.9, 20.0)) == 0.0  # ticks are rounded
    assert foreign_share(before, before) == 0.0


def test_a_child_that_has_ended_is_ours() -> None:
    before = spent()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    after = spent()
    assert after.ours_s - before.ours_s >= 0.25
    assert after.busy_s - before.busy_s >= 0.25
