"""`make demo` runs, and says itself that nothing is left."""

import subprocess
import sys

from tests.patience import PATIENCE_S


def test_the_demo() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.demo"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 requests at once" in done.stdout
    assert "no process, socket or shared memory is left" in done.stdout
    assert done.stdout.count("[1]") == 1
