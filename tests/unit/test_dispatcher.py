"""The dispatcher told what happens, event by event; whole lives are in test_simulator.py."""

import math

import pytest

from nodeserve.policy.cost import RankWork
from nodeserve.policy.prefill_instance import MIN_DEADLINE_S, PROBE_EVERY_S
from nodeserve.policy.units import PassDone, Waiting
from tests.fakes.dispatch import BUDGET, Node


def test_a_request_that_finds_an_idle_node_leaves_at_once() -> None:
    node = Node(4)
    now_s = node.learn() + 100.0
    [first] = node.push(now_s, 10)
    assert list(node.decide(now_s).values()) == [[first]]


def test_departures_rotate_and_none_goes_to_an_instance_whose_pass_runs() -> None:
    node = Node(2, admission="pull")
    now_s = node.learn()
    order: list[int] = []
    for tick in range(2):
        node.push(now_s + tick / 10, 10)
        order.extend(node.decide(now_s + tick / 10))
    assert sorted(order) == [0, 1]
    node.push(now_s + 0.5, 10)
    assert node.decide(now_s + 0.5) == {}
    node.end_pass(order[0], now_s, now_s + 1.0)
    assert list(node.decide(now_s + 1.0)) == [order[0]]


def test_the_second_of_two_instances_waits_for_the_middle_of_the_pass() -> None:
    node = Node(2)
    start_s = node.learn()
    for tick in range(500):  # dense arrivals, so that holding pays
        node.dispatcher.window.arrived(start_s - 5 + tick / 100)
    node.push(start_s, 10)
    [first] = node.decide(start_s)
    node.push(start_s + 0.1, 10)
    wake_s = node.wake_s(start_s + 0.1)
    assert wake_s is not None and start_s + 0.4 < wake_s < start_s + 0.6
    assert list(node.decide(wake_s)) == [1 - first]


def test_with_prompts_left_the_next_pass_takes_whoever_waits_or_is_told_to_go_on() -> None:
    node = Node(2)
    now_s = node.learn()
    node.push(now_s, 150)
    [first] = node.decide(now_s)
    node.end_pass(first, now_s, now_s + 1.0, 100, left=50)
    assert node.decide(now_s + 1.0) == {first: []}, "nobody waits: go on"
    node.end_pass(first, now_s + 1.0, now_s + 2.0, 50, left=50)
    [late] = node.push(now_s + 2.0, 20)
    assert node.decide(now_s + 2.0)[first] == [late], "whatever the window says"


def test_a_pass_is_over_when_its_last_rank_has_reported() -> None:
    node = Node(1, num_ranks=2)
    node.push(0.0, 50, 50)
    node.decide(0.0)
    node.push(0.5, 10)
    for unit in (0, 1):
        assert node.decide(1.0) == {}
        node.load(unit)
        work = RankWork(50, 1250.0)
        node.dispatcher.on_pass(unit, PassDone(1, 0.0, 1.0, work), 1.0)
    assert list(node.decide(1.0)) == [0]


def test_a_rank_read_after_another_one_s_next_pass_hides_neither_its_end() -> None:
    """As when the coordinator was busy for a pass: both reports of a rank, then both of another."""
    node = Node(1, num_ranks=2, admission="shortest-queue")
    now_s = 10.0
    node.push(now_s, 150, 150)
    node.decide(now_s)
    for unit in (0, 1):
        for step, left in ((1, 50), (2, 0)):
            node.load(unit, left)
            work = RankWork(100 - left, 100.0)
            node.dispatcher.on_pass(unit, PassDone(step, now_s + step, 1.0, work), now_s + 3.0)
    assert node.dispatcher.times.mean_s == 1.0
    assert node.wake_s(now_s + 3.0) is None


def test_an_instance_is_not_boarded_between_the_reports_of_its_ranks() -> None:
    """A rank had no work, so with the other's report nothing is outstanding; its own report would
    then have been taken for the end of the next pass."""
    node = Node(1, num_ranks=2)
    node.push(0.0, 50)
    node.decide(0.0)
    node.load(0)
    node.dispatcher.on_pass(0, PassDone(1, 0.0, 1.0, RankWork(50, 1250.0)), 1.0)
    node.push(1.0, 10)
    assert node.decide(1.0) == {}
    node.load(1)
    node.dispatcher.on_pass(1, PassDone(1, 0.0, 1.0, RankWork()), 1.0)
    assert list(node.decide(1.0)) == [0]


@pytest.mark.parametrize(
    ("admission", "units"),
    [
        ("round-robin", [0, 2, 1, 3, 0]),
        ("shortest-queue", [0, 2, 3, 1, 2]),  # by tokens; of equals the less loaded instance
        ("fewest-requests", [0, 2, 1, 3, 0]),
    ],
)
def test_immediate_arms_dispatch_on_arrival(admission: str, units: list[int]) -> None:
    node = Node(2, num_ranks=2, admission=admission)
    picked: list[int] = []
    for tick, num_tokens in enumerate([90, 10, 20, 30, 40]):
        node.push(float(tick), num_tokens)
        [departure] = node.dispatcher.decide(float(tick)).departures
        picked.extend(unit for _, unit in departure.boarded)
    assert picked == units
    assert not len(node.dispatcher)


def test_a_cancelled_request_does_not_board() -> None:
    node = Node(1)
    ids = node.push(0.0, 10, 10)
    assert node.dispatcher.remove(ids[0]) and not node.dispatcher.remove(ids[0])
    assert node.decide(0.0) == {0: [ids[1]]}
    assert not node.dispatcher.remove(ids[1]), "it has left"


def test_an_overdue_instance_is_suspect_and_probed_and_lives_again_with_any_word() -> None:
    node = Node(2)
    now_s = node.learn()
    node.push(now_s, 50)
    [late] = node.decide(now_s)
    deadline_s = node.wake_s(now_s)
    assert deadline_s is not None and deadline_s > now_s + MIN_DEADLINE_S
    decision = node.dispatcher.decide(deadline_s)
    assert decision.probes == [late]
    assert decision.wake_s == pytest.approx(deadline_s + PROBE_EVERY_S)
    [other] = node.push(deadline_s, 10)
    assert node.decide(deadline_s) == {1 - late: [other]}, "nobody boards a suspect"
    node.load(late)  # its answer: it is idle, the report was lost
    node.dispatcher.heard(late, deadline_s + 0.1)
    [again] = node.push(deadline_s + 0.1, 10)
    assert node.decide(deadline_s + 0.1) == {late: [again]}


def test_a_lost_report_is_no_dead_time() -> None:
    node = Node(2)
    now_s = node.learn()
    node.push(now_s, 50)
    [late] = node.decide(now_s)
    node.dispatcher.decide(now_s + 20.0)
    node.load(late, left=50)
    node.dispatcher.heard(late, now_s + 20.0)
    node.decide(now_s + 20.0)
    node.end_pass(late, now_s + 20.0, now_s + 21.0)
    assert node.dispatcher.window.dead_s == pytest.approx(0.0)


def test_a_busy_suspect_gets_twice_the_time() -> None:
    node = Node(2)
    now_s = node.learn()
    node.push(now_s, 50)
    [late] = node.decide(now_s)
    first_s = node.wake_s(now_s)
    assert first_s is not None
    node.dispatcher.decide(first_s)
    node.load(late, left=50)
    node.dispatcher.heard(late, first_s)
    assert node.decide(first_s) == {late: []}, "it may be waiting for a word to go on"
    second_s = node.wake_s(first_s)
    assert second_s is not None and second_s - first_s > 1.5 * (first_s - now_s)


def test_most_instances_silent_falls_back_to_dispatch_on_arrival() -> None:
    node = Node(2)
    now_s = node.learn()
    for tick in range(2):
        node.push(now_s + 2 * tick, 50)
        assert node.decide(now_s + 2 * tick)
    late_s = now_s + 100.0
    node.dispatcher.decide(late_s)
    assert node.dispatcher.falling_back
    [request] = node.push(late_s, 10)
    assert [request] in node.decide(late_s).values(), "nobody waits for who may never answer"
    for tick in range(3):
        for place in range(2):
            node.end_pass(place, late_s + tick, late_s + tick + 1.0)
    assert not node.dispatcher.falling_back


def test_a_lost_instance_gets_nothing_and_one_that_joins_again_does() -> None:
    node = Node(2)
    node.dispatcher.lose(0)
    for tick in range(3):
        node.push(float(tick), 10)
        assert 0 not in node.decide(float(tick))
        node.end_pass(1, float(tick), tick + 0.5)
    node.dispatcher.join(0)
    node.push(9.0, 10)
    assert list(node.decide(9.0)) == [0], "it left longest ago"


def test_the_predicted_wait_grows_with_what_is_ahead() -> None:
    node = Node(2)
    assert node.dispatcher.predict(Waiting(1, 50, 1, 0.0), 0.0) is None
    now_s = node.learn()
    waiting = Waiting(1000, 50, 1, now_s)
    idle = node.dispatcher.predict(waiting, now_s)
    assert idle is not None and idle.others_s == 0.0
    assert idle.own_s == pytest.approx(1.0, rel=0.2), "its own pass"
    for _ in range(2):
        node.push(now_s, 50)
        node.decide(now_s)
    node.push(now_s, *[50] * 40)
    busy = node.dispatcher.predict(waiting, now_s)
    assert busy is not None and busy.others_s > 5.0 and busy.own_s == idle.own_s
    long = node.dispatcher.predict(Waiting(1001, 1050, 1, now_s), now_s)
    assert long is not None and long.own_s > busy.own_s + 5.0
    assert math.isfinite(long.whole_s)


def busy_node(admission: str) -> tuple[Node, float]:
    """Two instances that ended passes of 1 s, and have nothing to do."""
    node = Node(2, admission=admission)
    now_s = 0.0
    for _ in range(8):
        node.push(now_s, BUDGET, BUDGET)
        node.decide(now_s)
        for instance in (0, 1):
            node.end_pass(instance, now_s, now_s + 1.0, BUDGET)
        now_s += 1.0
    return node, now_s


@pytest.mark.parametrize("admission", ["round-robin", "shortest-queue", "pull", "staggered"])
@pytest.mark.parametrize("lengths", [[BUDGET] * 40, [20 * BUDGET] * 2])
def test_the_predicted_wait_counts_what_the_instances_have(
    admission: str, lengths: list[int]
) -> None:
    node, now_s = busy_node(admission)
    node.push(now_s, *lengths)
    node.decide(now_s)
    wait = node.dispatcher.predict(Waiting(9999, BUDGET, 1, now_s), now_s)
    assert wait is not None
    assert wait.whole_s == pytest.approx(21.0, abs=1.5), "20 passes of each, then its own"


def test_one_that_joins_knows_nothing_of_its_earlier_life() -> None:
    node = Node(2, num_ranks=2)
    now_s = node.learn()
    instance = node.dispatcher.instances[0]
    node.dispatcher.on_pass(0, PassDone(99, now_s, 1.0, RankWork(5, 12.5, 7, 700)), now_s + 1.0)
    node.dispatcher.lose(0)
    node.dispatcher.join(0)
    assert instance.next_pass() == [RankWork(), RankWork()]
    [request] = node.push(now_s, 10)
    assert node.decide(now_s) == {0: [request]}
    node.load(0)  # it was cancelled there
    assert instance.is_open is False
    node.decide(now_s)
    assert instance.is_open, "no rank of this life has still to report"
