"""The step loop's turns, one by one: the test is the coordinator, the device and the clock."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nodeserve.errors import CudaError, HandoffFailed, NodeServeError
from nodeserve.policy.batching import Limits
from nodeserve.policy.pacing import LEAST_LEAD_S
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling, sampling_to
from nodeserve.wire.messages import (
    AttachPages,
    Cancel,
    DetachPages,
    Dropped,
    FromWorker,
    KvPulled,
    KvReady,
    PagesAttached,
    Prefill,
    Prompt,
    PullKv,
    ReleaseKv,
    RequestFailed,
    StepDone,
    ToWorker,
    pack_ids,
    unpack_ids,
    unpack_request_ids,
)
from nodeserve.worker.contract import CopyFailed, Landed, Moved, Offered, Ran, Source, Ticket
from nodeserve.worker.peer_seats import PeerSeats
from nodeserve.worker.runner import Runner
from tests.fakes.late_model import LateExecutor
from tests.fakes.link import FakeLink
from tests.fakes.model import ENTRY_BYTES, FakeExecutor, FakeSettings, expected_stream
from tests.fakes.pages import WHOLE, uncut

BLOCK, NUM_BLOCKS = 16, 32
PROMPT = [11, 22, 33, 44]


class FakeTransfer:
    """Copies land, and pages are offered, when the test says so."""

    def __init__(self) -> None:
        self.begun: list[Ticket] = []
        self.problem: NodeServeError | None = None  # of the pulls to come
        self.moved: list[Moved] = []
        self.busy = False
        self.offers_late = False
        self.wake: Callable[[], None] | None = None

    def on_done(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        """Any peer's pages will do."""

    def detach(self, team: int) -> list[int]:
        lost = [ticket for ticket in self.begun if ticket.source == team]
        self.begun = [ticket for ticket in self.begun if ticket not in lost]
        return [ticket.request_id for ticket in lost]

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None:
        return None if self.offers_late else block_ids

    def withdraw(self, request_id: int) -> None:
        pass

    def begin(self, ticket: Ticket) -> None:
        if self.problem is not None:
            raise self.problem
        self.begun.append(ticket)

    def poll(self) -> list[Moved]:
        moved, self.moved = self.moved, []
        return moved

    def cancel(self, request_id: int) -> None:
        pass


class Bench:
    """A runner, and everything around it in the test's hands."""

    def __init__(self, late: bool = True) -> None:
        self.now_s = 100.0
        self.link, self.transfer = FakeLink(), FakeTransfer()
        pool = bytearray(NUM_BLOCKS * BLOCK * ENTRY_BYTES)
        self.device = LateExecutor(FakeSettings(), pool, BLOCK)
        executor = self.device if late else FakeExecutor(FakeSettings(), pool, BLOCK)
        self.scheduler = Scheduler(Limits(NUM_BLOCKS, BLOCK, 256, 8, 64))
        seats = PeerSeats(self.transfer, uncut(BLOCK * ENTRY_BYTES))
        self.runner = Runner(
            self.link, self.scheduler, executor, self.transfer, seats, clock=lambda: self.now_s
        )

    @property
    def num_on_the_way(self) -> int:
        return len(self.device.on_the_way)

    def turn(self, *messages: ToWorker, after_s: float = 0.0) -> list[FromWorker]:
        """What is said in one turn."""
        self.now_s += after_s
        self.link.inbox.extend(messages)
        said = len(self.link.said)
        self.runner.turn()
        self.scheduler.check()
        return self.link.said[said:]

    def end_step(self, after_s: float = 0.0) -> StepDone:
        """The running step ends and is told."""
        self.now_s += after_s
        self.device.compute_one()
        steps = [message for message in self.turn() if isinstance(message, StepDone)]
        assert len(steps) == 1
        return steps[0]

    def decode(self, *request_ids: int, **sampling: Any) -> None:
        """Requests with their first token, and a decode step on its way."""
        for request_id in request_ids:
            self.turn(prefill(request_id, **sampling))
            while self.scheduler.load()[1]:
                self.end_step()


def prefill(request_id: int, handoff: bool = False, **sampling: Any) -> Prefill:
    values = sampling_to(Sampling(**{"temperature": 0.0, **sampling}))
    return Prefill(0, [Prompt(request_id, pack_ids(PROMPT), len(PROMPT), values, handoff)])


def pull(request_id: int) -> PullKv:
    tokens = [*PROMPT, *expected_stream(PROMPT, 1)]
    return PullKv(request_id, 0, pack_ids([5]), pack_ids(tokens), len(PROMPT), {})


def tokens_of(step: StepDone) -> dict[int, int]:
    ids, tokens = unpack_request_ids(step.request_ids), unpack_ids(step.token_ids)
    return dict(zip(ids, tokens, strict=True))


def test_where_launching_is_computing_a_turn_is_a_step() -> None:
    bench = Bench(late=False)
    stream = expected_stream(PROMPT, 3)
    told = [bench.turn(prefill(1, max_tokens=3)), bench.turn(), bench.turn()]
    assert [tokens_of(step) for [step] in told] == [{1: token} for token in stream]  # type: ignore[arg-type]
    assert bench.link.waits == []
    assert bench.turn() == [] and bench.link.waits == [1.0]


def test_one_step_runs_and_at_most_one_waits_behind_it() -> None:
    bench = Bench()
    bench.turn(prefill(1))
    assert bench.num_on_the_way == 1 and bench.link.waits == []
    bench.turn()
    assert bench.num_on_the_way == 1 and bench.link.waits == [1.0], "prompts: no step behind"
    stream = expected_stream(PROMPT, 20)
    for token in stream:
        assert tokens_of(bench.end_step()) == {1: token}
        bench.turn()
        assert bench.num_on_the_way <= 2
    assert bench.num_on_the_way == 2


def test_the_end_of_a_step_and_of_a_copy_wake_the_loop() -> None:
    bench = Bench()
    bench.turn(prefill(1))
    bench.device.compute_one()
    assert bench.link.num_wakes == 1
    assert bench.transfer.wake is not None
    bench.transfer.wake()
    assert bench.link.num_wakes == 2


def test_the_step_behind_is_planned_as_late_as_is_safe() -> None:
    bench = Bench()
    bench.decode(1)
    bench.turn()
    assert bench.num_on_the_way == 2, "nothing is known of steps yet: at once"
    for _ in range(12):  # more than are remembered: the first ones took no time here
        bench.end_step(after_s=bench.runner._ended_s + 0.010 - bench.now_s)
        while bench.num_on_the_way < 2:
            bench.turn(after_s=1e-4)
    bench.link.waits.clear()
    bench.end_step(after_s=bench.runner._ended_s + 0.010 - bench.now_s)
    assert bench.num_on_the_way == 1
    assert bench.link.waits == [pytest.approx(0.010 - LEAST_LEAD_S)]
    bench.turn(after_s=bench.link.waits[0] / 2)
    assert bench.num_on_the_way == 1
    assert bench.link.waits[1] == pytest.approx(bench.link.waits[0] / 2)
    bench.turn(after_s=bench.link.waits[1])
    assert bench.num_on_the_way == 2


def test_a_step_takes_from_its_launch_or_the_end_of_the_one_before() -> None:
    bench = Bench()
    bench.turn(prefill(1))
    step = bench.end_step(after_s=0.030)
    assert step.step_s == pytest.approx(0.030) and step.num_prefill_tokens == len(PROMPT)
    bench.turn(after_s=0.001)
    assert bench.num_on_the_way == 2
    assert bench.end_step(after_s=0.009).step_s == pytest.approx(0.010)
    assert bench.end_step(after_s=0.012).step_s == pytest.approx(0.012), "launched 21 ms ago"


@pytest.mark.parametrize("num_turns", [0, 1])
def test_a_cancel_is_answered_while_the_step_runs(num_turns: int) -> None:
    bench = Bench()
    bench.decode(1, 2)
    for _ in range(num_turns):
        bench.turn()
    num_launched = bench.num_on_the_way
    assert num_launched == 1 + num_turns
    [dropped] = bench.turn(Cancel(1))
    assert isinstance(dropped, Dropped) and dropped.load[:5] == [1, 0, 0, NUM_BLOCKS - 2, 0]
    for place in range(num_launched):
        step = bench.end_step()
        assert set(tokens_of(step)) == {2}
        assert step.load[3] == NUM_BLOCKS - (1 if place == num_launched - 1 else 2)


def test_a_step_that_nobody_waits_for_is_told_with_its_load() -> None:
    bench = Bench()
    bench.decode(1)
    bench.turn(Cancel(1))
    while bench.num_on_the_way:
        step = bench.end_step()
        assert tokens_of(step) == {} and step.logprobs is None
    assert step.load[:5] == [0, 0, 0, NUM_BLOCKS, 0]


def test_logprobs_keep_to_their_tokens_when_others_are_dropped() -> None:
    bench = Bench()
    bench.decode(1, 2, 3, logprobs=1)
    bench.turn(Cancel(2))
    step = bench.end_step()
    tokens = unpack_ids(step.token_ids)
    assert unpack_request_ids(step.request_ids) == array("Q", [1, 3])
    assert step.logprobs is not None
    assert [row for row, *_ in step.logprobs] == [0, 1]
    tops = [unpack_ids(top_ids)[0] for _, _, top_ids, _ in step.logprobs]
    assert tops == tokens.tolist()


def test_a_pull_begins_while_the_step_runs_and_joins_the_next() -> None:
    bench = Bench()
    bench.decode(1)
    [] = bench.turn(pull(2))
    [ticket] = bench.transfer.begun
    assert ticket.request_id == 2 and bench.num_on_the_way == 2
    bench.transfer.moved.append(Landed(2, 128, 0.001))
    [pulled] = bench.turn()
    assert isinstance(pulled, KvPulled) and pulled.request_id == 2
    assert set(tokens_of(bench.end_step())) == {1}, "both were launched before"
    assert set(tokens_of(bench.end_step())) == {1}
    assert set(tokens_of(bench.end_step())) == {1, 2}


def test_pages_are_offered_and_released_while_a_step_runs() -> None:
    bench = Bench()
    bench.transfer.offers_late = True
    bench.decode(1)
    bench.turn(prefill(2, handoff=True))
    steps = [bench.end_step(), bench.end_step()]
    assert [step.kv_ready for step in steps] == [[], []]
    assert bench.num_on_the_way
    bench.transfer.moved.append(Offered(2, pack_ids([1])))
    assert bench.turn() == [KvReady(2, pack_ids([1]))]
    [dropped] = bench.turn(ReleaseKv(2))
    assert isinstance(dropped, Dropped) and dropped.load[:5] == [1, 0, 0, NUM_BLOCKS - 1, 0]


def test_a_copy_that_fails_takes_only_its_request_along() -> None:
    bench = Bench()
    bench.transfer.offers_late = True
    bench.decode(1)
    bench.turn(prefill(2, handoff=True))
    bench.end_step()
    bench.end_step()
    problem = HandoffFailed("the pages cannot be copied")
    bench.transfer.moved.append(CopyFailed(2, problem))
    [failed] = bench.turn()
    load = [1, 0, 0, NUM_BLOCKS - 1, 0, 2]
    assert failed == RequestFailed(2, "handoff_failed", "the pages cannot be copied", load)
    assert set(tokens_of(bench.end_step())) == {1}


def test_a_pull_that_cannot_begin_fails_alone_unless_the_device_is_lost() -> None:
    """A worker without steps has no other way to find out, and would fail all that comes."""
    bench = Bench()
    bench.transfer.problem = HandoffFailed("the pages cannot be copied")
    [failed] = bench.turn(pull(2))
    load = [0, 0, 0, NUM_BLOCKS, 0, 1]
    assert failed == RequestFailed(2, "handoff_failed", "the pages cannot be copied", load)
    bench.scheduler.check()
    bench.transfer.problem = CudaError("cudaStreamSynchronize: an illegal memory access", 700)
    with pytest.raises(CudaError, match="illegal"):
        bench.turn(pull(3))


def test_pulls_from_a_peer_that_ended_fail_alone() -> None:
    bench = Bench()
    for peer in (0, 5):
        assert bench.turn(AttachPages(peer, -1, 0, b"", peer, WHOLE)) == [PagesAttached(peer)]
    [] = bench.turn(pull(2))
    assert bench.turn(DetachPages(5)) == []
    [failed] = bench.turn(DetachPages(0))
    assert isinstance(failed, RequestFailed) and failed.code == "handoff_failed"
    bench.scheduler.check()
    assert failed.load == [0, 0, 0, NUM_BLOCKS, 0, 1]


def test_a_prompt_that_cannot_run_is_refused_while_a_step_runs() -> None:
    bench = Bench()
    bench.decode(1)
    [prompt] = prefill(2).prompts
    long = prompt._replace(token_ids=pack_ids([1] * 256))
    [failed] = bench.turn(Prefill(0, [long]))
    assert isinstance(failed, RequestFailed) and failed.code == "prompt_too_long"


def test_two_steps_that_ended_meanwhile_are_told_in_their_order() -> None:
    bench = Bench()
    bench.decode(1)
    bench.turn()
    bench.device.compute_one()
    bench.device.compute_one()
    steps = [message for message in bench.turn() if isinstance(message, StepDone)]
    assert [tokens_of(step)[1] for step in steps] == expected_stream(PROMPT, 3)[1:]


def test_a_busy_transfer_keeps_the_loop_awake() -> None:
    bench = Bench()
    bench.transfer.busy = True
    bench.turn()
    assert bench.link.waits == []
    bench.transfer.busy = False
    bench.turn()
    assert bench.link.waits == [1.0]


def test_a_rank_that_is_called_takes_part_without_work() -> None:
    bench = Bench()
    assert bench.turn() == []
    bench.device.is_called = True
    bench.turn()
    bench.device.is_called = False
    step = bench.end_step(after_s=0.25)
    assert tokens_of(step) == {} and step.step == 1 and step.step_s == 0.25
    assert (step.num_prefill_tokens, step.attention, step.kv_tokens) == (0, 0.0, 0)
    assert not bench.num_on_the_way


def test_a_device_that_counts_steps_says_when_they_ran() -> None:
    bench = Bench()
    bench.turn(prefill(1, max_tokens=1))
    bench.device.on_the_way[0].ran = Ran(17, 100.5, 0.25)
    step = bench.end_step(after_s=1.0)
    assert (step.step, step.began_s, step.step_s) == (17, 100.5, 0.25)
