"""A start that would hang ends, and says which worker is late and in what."""

import pytest

from tests.fakes.hanging_worker import PHASES
from tests.process.conftest import Nodes, names_of

# Where it stands when it is found: "ready" hangs after its last report.
FOUND_IN = {phase: f"in {phase!r}" for phase in PHASES} | {"ready": "after 'weights'"}


@pytest.mark.slow
def test_a_worker_that_hangs_in_its_start_is_named_with_its_phase(nodes: Nodes) -> None:
    """All phases at once, as each takes its time to be found."""
    started = {}
    for phase in PHASES:
        folder = nodes.folder / phase  # in one, only one server may start at a time
        folder.mkdir()
        started[phase] = nodes.spawn(
            socket=folder / "node.sock", layout="1p1d", hang=phase, startup_timeout=14.0
        )
    for phase, node in started.items():
        _, words = node.process.communicate(timeout=60)
        assert node.process.returncode == 1
        assert (
            f"worker_lost: decode worker 1 is late with its start: {FOUND_IN[phase]} since" in words
        )
        assert "prefill" not in words
        assert words.rstrip().endswith("give it more time with --startup-timeout (14 s)")
        assert not node.socket.exists() and not names_of(node.pid)


def test_the_whole_time_bounds_a_start_that_moves_too_slowly(nodes: Nodes) -> None:
    node = nodes.spawn(layout="1m", fake={"load_s": 60.0}, startup_timeout=2.0)
    _, words = node.process.communicate(timeout=30)
    assert (
        node.process.returncode == 1
        and "mixed worker 0 is late with its start: in 'weights' since" in words
    )
