"""A start that would hang ends, and says which worker is late and in what."""

import pytest

from tests.fakes.hanging_worker import PHASES
from tests.patience import PATIENCE_S
from tests.process.conftest import Nodes, RunningNode, names_of

WHOLE = "warm-up"  # may take all the time that there is
# Where it stands when it is found: "ready" hangs after its last report.
FOUND_IN = {phase: f"in {phase!r}" for phase in PHASES} | {"ready": "after 'weights'"}


def is_found(node: RunningNode, phase: str, timeout_s: int) -> None:
    _, words = node.process.communicate(timeout=PATIENCE_S)
    assert node.process.returncode == 1
    assert f"worker_lost: decode worker 1 is late with its start: {FOUND_IN[phase]} s" in words
    assert "prefill" not in words
    assert words.rstrip().endswith(f"give it more time with --startup-timeout ({timeout_s} s)")
    assert not node.socket.exists() and not names_of(node.pid)


@pytest.mark.slow
def test_a_worker_that_hangs_in_its_start_is_named_with_its_phase(nodes: Nodes) -> None:
    """All phases at once, as each takes its time to be found; the shortest is a quarter of it, in
    which a busy machine must have started two dozen processes."""
    started = {}
    for phase in PHASES:
        if phase != WHOLE:
            folder = nodes.folder / phase  # in one, only one server may start at a time
            folder.mkdir()
            started[phase] = nodes.spawn(
                socket=folder / "node.sock", layout="1p1d", hang=phase, startup_timeout=36.0
            )
    for phase, node in started.items():
        is_found(node, phase, 36)


@pytest.mark.slow
def test_the_whole_time_bounds_a_start(nodes: Nodes) -> None:
    is_found(nodes.spawn(layout="1p1d", hang=WHOLE, startup_timeout=12.0), WHOLE, 12)
