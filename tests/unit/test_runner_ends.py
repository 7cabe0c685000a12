"""How the step loop ends."""

import pytest

from nodeserve.wire.messages import Shutdown
from tests.unit.test_runner import Bench


def test_a_shutdown_waits_for_the_steps_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.decode(1)
    bench.turn()
    waited: list[int] = []
    for number, launched in enumerate(bench.runner._launched):
        monkeypatch.setattr(launched.flight, "result", lambda number=number: waited.append(number))
    bench.link.inbox.append(Shutdown())
    bench.runner.run()
    assert waited == [0, 1]


def test_a_step_that_failed_is_the_worker_s_end() -> None:
    bench = Bench()
    bench.decode(1)
    bench.device.on_the_way[0].end([], RuntimeError("the device is gone"))
    with pytest.raises(RuntimeError, match="gone"):
        bench.turn()
