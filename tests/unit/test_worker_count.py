"""What a worker counts for an audit: from the pool and the sequences, in the middle of steps."""

from array import array

from nodeserve.policy.batching import Limits, Sequence
from nodeserve.policy.scheduler import Scheduler
from nodeserve.types import Sampling
from nodeserve.wire.messages import Count, Counted, CountExperts, ExpertsCounted, Shutdown
from nodeserve.wire.numbers import unpack_request_ids
from nodeserve.worker.contract import ExpertRows
from nodeserve.worker.count import counted
from nodeserve.worker.peer_seats import PeerSeats
from nodeserve.worker.runner import Runner
from tests.fakes.link import FakeLink
from tests.fakes.model import ENTRY_BYTES, FakeExecutor, FakeSettings
from tests.fakes.pages import uncut
from tests.unit.test_runner import FakeTransfer

BLOCK = 16


def scheduler_of(num_blocks: int) -> Scheduler:
    return Scheduler(Limits(num_blocks, BLOCK, 64, 8, 128))


def sequence(request_id: int, num_tokens: int, handoff: bool = False) -> Sequence:
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    return Sequence(
        request_id, array("i", range(num_tokens)), num_tokens, sampling, handoff, received_s=0.0
    )


def ids(data: bytes) -> list[int]:
    return list(unpack_request_ids(data))


def step(scheduler: Scheduler) -> None:
    batch = scheduler.next_batch()
    assert batch is not None
    scheduler.commit(batch, [7] * len(batch.sampled))


def test_every_sequence_is_in_its_stage_and_all_blocks_are_somebodys() -> None:
    scheduler = scheduler_of(32)
    scheduler.submit(sequence(1, 20))
    scheduler.submit(sequence(2, 20, handoff=True))
    step(scheduler)
    scheduler.submit(sequence(3, 20))
    assert scheduler.begin_pull(sequence(4, 20))
    told = counted(9, scheduler, [], scheduler.load(), 5, 6)
    assert (told.number, told.num_records_received, told.num_records_sent) == (9, 5, 6)
    stages = (told.waiting, told.running, told.pulling, told.pinned, told.preempted)
    assert [ids(stage) for stage in stages] == [[3], [1], [4], [2], []]
    assert (told.num_blocks, told.num_free, told.num_held) == (32, 26, 6)
    assert told.problem == ""


def test_a_preemption_is_counted_until_its_step_is_told() -> None:
    """The coordinator learns of it by that step: until then it is neither here nor gone."""
    scheduler = scheduler_of(4)
    for request_id in (1, 2):
        scheduler.submit(sequence(request_id, 20))
    while True:
        batch = scheduler.next_batch()
        assert batch is not None
        if batch.preempted:
            break
        scheduler.commit(batch, [7] * len(batch.sampled))
    told = counted(1, scheduler, [batch], scheduler.load(), 0, 0)
    assert (ids(told.running), ids(told.preempted)) == ([1], [2])
    assert told.num_free + told.num_held == 4
    scheduler.commit(batch, [7] * len(batch.sampled))
    assert counted(2, scheduler, [], scheduler.load(), 0, 0).preempted == b""


def test_blocks_of_a_cancelled_request_are_held_until_its_step_is_over() -> None:
    scheduler = scheduler_of(8)
    scheduler.submit(sequence(1, 20))
    batch = scheduler.next_batch()
    assert batch is not None
    scheduler.cancel(1)
    told = counted(1, scheduler, [batch], scheduler.load(), 0, 0)
    assert (told.waiting, told.num_free, told.num_held) == (b"", 6, 2)
    scheduler.commit(batch, [7])
    assert counted(1, scheduler, [], scheduler.load(), 0, 0).num_free == 8


def test_a_fault_in_its_own_books_is_told_in_words() -> None:
    scheduler = scheduler_of(8)
    scheduler.blocks.allocate(1)
    told = counted(1, scheduler, [], scheduler.load(), 0, 0)
    assert told.problem.startswith("check: assert ") and "num_free" in told.problem
    assert told.num_free + told.num_held == 7


def test_a_leader_says_what_its_device_counted() -> None:
    link, scheduler = FakeLink(), scheduler_of(8)
    executor = FakeExecutor(FakeSettings(), bytearray(8 * BLOCK * ENTRY_BYTES), BLOCK)
    rows = iter((ExpertRows(b"l", b"e", b"r"), ExpertRows(b"l", b"f", b"s")))
    transfer = FakeTransfer()
    seats = PeerSeats(transfer, uncut(8))
    runner = Runner(link, scheduler, executor, transfer, seats, expert_rows=lambda: next(rows))
    link.inbox = [CountExperts(5), CountExperts(6), Shutdown()]
    runner.run()
    assert link.said == [ExpertsCounted(5, b"l", b"e", b"r"), ExpertsCounted(6, b"l", b"f", b"s")]


def test_records_are_counted_up_to_the_question_and_the_answer() -> None:
    link, pool = FakeLink(), bytearray(8 * BLOCK * ENTRY_BYTES)
    executor, transfer = FakeExecutor(FakeSettings(), pool, BLOCK), FakeTransfer()
    runner = Runner(link, scheduler_of(8), executor, transfer, PeerSeats(transfer, uncut(8)))
    link.inbox = [Count(1), Count(2), Shutdown()]
    runner.turn()
    first, second = link.said
    assert isinstance(first, Counted) and isinstance(second, Counted)
    assert (first.num_records_received, first.num_records_sent) == (1, 1)
    assert (second.num_records_received, second.num_records_sent) == (2, 2)
