"""How the step loop ends, and how it gives up one request of a step."""

from types import SimpleNamespace

import pytest

from nodeserve.errors import InvalidRequest, ShuttingDown
from nodeserve.policy.batching import Batch
from nodeserve.wire.messages import Cancel, Dropped, RequestFailed, Shutdown, StepDone
from nodeserve.worker.contract import Failure, Flight
from tests.unit.test_runner import Bench, prefill, tokens_of


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


def test_a_rank_that_stops_takes_part_in_the_step_that_others_are_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They came to wait for it after it had asked."""
    bench = Bench()
    waited: list[bool] = []
    flight = SimpleNamespace(result=lambda: waited.append(True))
    monkeypatch.setattr(bench.device, "leave", lambda: True)
    monkeypatch.setattr(bench.device, "launch", lambda batch: flight if not batch.work else None)
    bench.link.inbox.append(Shutdown())
    bench.runner.run()
    assert waited == [True]


def test_a_rank_whose_neighbour_has_left_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def launch(batch: Batch) -> Flight:
        raise ShuttingDown("a rank of this instance has left")

    monkeypatch.setattr(bench.device, "launch", launch)
    assert bench.turn(prefill(1)) == []
    bench.runner.run()
    assert bench.runner.stopped and not bench.link.said


def test_a_step_that_failed_is_the_worker_s_end() -> None:
    bench = Bench()
    bench.decode(1)
    bench.device.on_the_way[0].end([], RuntimeError("the device is gone"))
    with pytest.raises(RuntimeError, match="gone"):
        bench.turn()


def fails(row: int) -> tuple[Failure, ...]:
    return (Failure(row, InvalidRequest("constraint cannot be followed")),)


def test_a_request_without_a_next_token_fails_alone() -> None:
    bench = Bench()
    bench.decode(1, 2)
    bench.device.on_the_way[0].failed = fails(0)
    bench.device.compute_one()
    step, failed = bench.turn()[:2]
    assert isinstance(step, StepDone) and set(tokens_of(step)) == {2}
    assert isinstance(failed, RequestFailed)
    assert (failed.request_id, failed.code) == (1, "invalid_request")
    assert failed.load[0] == 1, "its blocks and its place are free"
    assert set(tokens_of(bench.end_step())) == {2}


@pytest.mark.parametrize("handoff", [False, True])
def test_a_request_without_a_first_token_fails_and_is_not_handed_over(handoff: bool) -> None:
    bench = Bench()
    bench.turn(prefill(1, handoff=handoff))
    bench.device.on_the_way[0].failed = fails(0)
    bench.device.compute_one()
    step, failed = bench.turn()
    assert isinstance(step, StepDone) and not step.request_ids and not step.kv_ready
    assert isinstance(failed, RequestFailed) and failed.load[:3] == [0, 0, 0]
    assert failed.load[3] == bench.scheduler.limits.num_blocks


def test_a_request_that_was_cancelled_meanwhile_has_ended_once() -> None:
    bench = Bench()
    bench.decode(1)
    assert isinstance(bench.turn(Cancel(1))[0], Dropped)
    bench.device.on_the_way[0].failed = fails(0)
    bench.device.compute_one()
    assert [type(message) for message in bench.turn()] == [StepDone]
