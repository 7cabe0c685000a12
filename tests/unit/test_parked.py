"""Who waits for room to decode: the order of the line, and what asking it costs."""

import sys
from collections.abc import Callable
from random import Random

from nodeserve.plan.records import Arrival
from nodeserve.plan.simulator import Simulation
from nodeserve.policy.account import Account
from nodeserve.policy.decode_allocation import DecodeAllocator, ReadyKv
from nodeserve.policy.parked import MAX_ROUND, ParkedQueue
from nodeserve.policy.units import DispatchOptions, Unit
from tests.fakes.simulation import profile, scenario


def test_who_is_parked_again_keeps_its_place() -> None:
    queue = ParkedQueue()
    for request_id, priority in [(4, 0), (2, 0), (9, 5), (3, -1), (7, 5)]:
        queue.push(ReadyKv(request_id, 1, 0), priority)
    assert [ready.request_id for ready in queue.first(9)] == [7, 9, 2, 4, 3]
    queue.remove(2)
    queue.remove(2)
    queue.remove(99)
    queue.push(ReadyKv(2, 1, 0), 5)
    assert [ready.request_id for ready in queue.first(3)] == [2, 7, 9] and len(queue) == 5


def test_rounds_go_on_while_there_is_room_and_keep_the_order() -> None:
    """As one sort of all that wait would have it."""
    random, queue = Random(1), ParkedQueue()
    priorities = {request_id: random.randint(-2, 2) for request_id in range(3 * MAX_ROUND)}
    for request_id, priority in priorities.items():
        queue.push(ReadyKv(request_id, 1, 0), priority)
    line = sorted(priorities, key=lambda one: (-priorities[one], one))
    unit = Unit(0, 0, Account(5 * MAX_ROUND))
    placed = list(queue.place(DecodeAllocator("fewest-requests", 10_000), [unit]))
    assert [request_id for request_id, _ in placed] == line[: len(placed)]
    assert 2 * MAX_ROUND < len(placed) < 3 * MAX_ROUND
    assert [one.request_id for one in queue.first(9999)] == line[len(placed) :]
    assert not list(queue.place(DecodeAllocator("fewest-requests", 10_000), []))


def test_a_report_of_a_full_node_costs_the_same_however_many_wait() -> None:
    """Far beyond capacity: the calls of a turn with 5,000 parked are those with 500."""
    made = scenario(
        "1p1d",
        profile=profile(num_blocks=100_000, prefill_fix_s=0.001),
        dispatch=DispatchOptions("shortest-queue", budget=4096, max_num_seqs=50),
        decode_allocation="fewest-requests",
    )
    costs: list[int] = []
    for num_parked in (500, 5000):
        # So many are left when as many as may decode do.
        run = Simulation(made, [Arrival(0.0, 8, 3000)] * (num_parked + 50))
        run.start()
        while len(run.handoffs.parked) < num_parked or run.dispatcher:
            assert run.turn()
        costs.append(calls_in(run.turn, 100))
        assert len(run.handoffs.parked) == num_parked
    assert costs[1] < 1.1 * costs[0]


def calls_in(work: Callable[[], object], times: int) -> int:
    """Functions called meanwhile, ours and those in C."""
    count = 0

    def on(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on)
    try:
        for _ in range(times):
            work()
    finally:
        sys.setprofile(None)
    return count
