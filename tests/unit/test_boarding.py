"""Who is on board when a batch departs."""

import pytest

from nodeserve.policy import prefill_allocation
from nodeserve.policy.cost import RankWork
from nodeserve.policy.units import PassDone, Unit, Waiting
from nodeserve.types import Load
from tests.fakes.dispatch import BLOCKS, BUDGET, Node, learn_lengths


def test_instances_that_open_together_share_a_burst() -> None:
    """Filled to the brim, one pass would be long while the other instance is empty."""
    node = Node(2, num_ranks=2, admission="pull")
    now_s = learn_lengths(node, 0.0)
    node.push(now_s, *[20] * 8)
    assert [len(boarded) for boarded in node.decide(now_s).values()] == [4, 4]


def test_a_burst_that_mixed_instances_share_boards_whole() -> None:
    """They are open all the time: those that have their share already do not take another."""
    node = Node(4, decodes=True, admission="pull")
    now_s = learn_lengths(node, 0.0)
    node.push(now_s, *[20] * 16)
    assert [len(boarded) for boarded in node.decide(now_s).values()] == [4, 4, 4, 4]


def test_where_a_full_pass_takes_no_longer_nobody_shares() -> None:
    node = Node(2, num_ranks=2, admission="pull")
    now_s = node.learn()
    node.push(now_s, *[20] * 8)
    assert [len(boarded) for boarded in node.decide(now_s).values()] == [8]


def test_a_burst_is_not_spread_below_its_longest_prompt() -> None:
    node = Node(2, num_ranks=2, admission="pull")
    now_s = learn_lengths(node, 0.0)
    ids = node.push(now_s, 90, 10, 10, 10, 10)
    [boarded] = node.decide(now_s).values()
    assert boarded == ids, "the pass is as long as that prompt in any case"


def test_a_prompt_boards_where_it_fits_whole_until_it_is_left_behind() -> None:
    node = Node(3, admission="pull")
    now_s = learn_lengths(node, 0.0)
    node.push(now_s, 100, 100, 100)  # one for each
    assert len(node.decide(now_s)) == 3
    [one, two] = node.push(now_s, 60, 60)
    node.end_pass(0, now_s, now_s + 1.0)
    assert node.decide(now_s + 1.0) == {0: [one]}, "60 do not fit the other 40"
    [three] = node.push(now_s + 1.0, 60)
    node.end_pass(1, now_s, now_s + 1.5)
    assert node.decide(now_s + 1.5) == {1: [two]}
    node.end_pass(0, now_s + 1.0, now_s + 2.0)
    assert node.decide(now_s + 2.0) == {0: [three]}


def test_prompts_of_one_length_share_passes_as_they_come() -> None:
    """Nobody shorter would fill the place that is left."""
    node = Node(2, admission="pull")
    now_s = node.learn()
    first, second, third = node.push(now_s, 60, 60, 60)
    assert node.decide(now_s) == {0: [first, second], 1: [third]}


def test_running_decodes_do_not_keep_out_a_prompt_as_long_as_a_pass() -> None:
    """With them no pass would ever hold it whole."""
    node = Node(2, decodes=True)
    now_s = node.learn()
    for unit in node.units:
        unit.account.report(Load(1, 0, 0, BLOCKS - 5, 0, node.received[unit.index]))
    [request] = node.push(now_s, BUDGET)
    assert list(node.decide(now_s).values()) == [[request]]


def test_one_departure_carries_the_batch_for_all_ranks() -> None:
    node = Node(1, num_ranks=4)
    ids = node.push(0.0, 90, 80, 70, 60, 20)
    [departure] = node.dispatcher.decide(0.0).departures
    assert [one.request_id for one, _ in departure.boarded] == ids
    assert [unit for _, unit in departure.boarded] == [0, 1, 2, 3, 3]


def test_parked_pages_pause_departures_until_they_are_pulled() -> None:
    node = Node(1)
    node.load(0, pinned=3, free=BLOCKS // 2 - 1)
    node.push(0.0, 10)
    assert node.decide(0.0) == {}
    node.load(0, pinned=3, free=BLOCKS // 2)
    assert list(node.decide(1.0)) == [0]


def test_a_request_without_memory_is_passed_over_but_not_for_ever() -> None:
    node = Node(1)
    node.units[0].account.send(1, 1)
    node.load(0, free=10)
    node.received[0] = 1
    node.units[0].account.report(Load(1, 0, 0, 10, 0, 1))
    big = Waiting(99, 50, 20, 0.0)
    node.dispatcher.push(big, 0.0)
    overtaken = 0
    for tick in range(40):
        now_s = 1.0 + tick
        node.push(now_s, 1)
        if not node.decide(now_s):
            break
        node.units[0].account.report(Load(1, 0, 0, 10, 0, node.received[0]))
        overtaken += 1
        node.steps[0] += 1
        node.dispatcher.on_pass(0, PassDone(node.steps[0], now_s, 0.5, RankWork(1, 0.5)), now_s)
    assert 10 <= overtaken < 30, "then what comes free is kept for it"


@pytest.mark.parametrize(("free", "max_num_seqs", "most"), [(1, 256, 32 * 8), (BLOCKS, 1, 0)])
def test_a_departure_looks_behind_few_that_find_no_room(
    free: int, max_num_seqs: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def fits(unit: Unit, waiting: Waiting, max_num_seqs: int) -> bool:
        looked.append(waiting.request_id)
        return prefill_allocation_fits(unit, waiting, max_num_seqs)

    prefill_allocation_fits = prefill_allocation.fits
    monkeypatch.setattr(prefill_allocation, "fits", fits)
    node = Node(1, num_ranks=8, max_num_seqs=max_num_seqs)
    for unit in node.units:
        unit.account.report(Load(1, 0, 0, free, 0, 0))
    for request_id in range(500):
        node.dispatcher.push(Waiting(request_id, 1, 2, 0.0), 0.0)
    assert not node.decide(0.0)
    assert len(looked) <= most
