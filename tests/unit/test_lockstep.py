"""Ranks that run their passes together: in one process here, on one board, with bells of their own.

Every `Board` opens the memory again, so ranks in one process exclude each other as processes do.
"""

import contextlib
import math
import os
import select
import threading
from collections.abc import Iterator, Sequence
from random import Random

import pytest

from nodeserve.coordinator.shared import make_lockstep
from nodeserve.errors import ShuttingDown
from nodeserve.policy.cost import IDLE, RankWork
from nodeserve.worker.alarm import Alarm
from nodeserve.worker.contract import Ran
from nodeserve.worker.lockstep import Board, Lockstep
from nodeserve.worker.ranks import NO_RANKS, InStep, ranks_of
from tests.fakes.harness import default_spec
from tests.patience import PATIENCE_S

WORK = RankWork(prefill_tokens=10, attention=2.5, num_decodes=3, kv_tokens=40)


class Ranks:
    """An instance whose time is the test's; a pass takes 1 s for each prompt token of the rank that
    has most."""

    def __init__(self, owner: contextlib.ExitStack, num_ranks: int, num_stages: int = 1) -> None:
        fds = make_lockstep(num_ranks)
        owner.callback(fds.close)
        self.now_s = 100.0
        self.asked: list[tuple[int, list[RankWork]]] = []
        self.bells = fds.bells
        self.ranks = [
            Lockstep(
                Board(fds.board, num_ranks), rank, fds.bells, self.duration, self.clock, num_stages
            )
            for rank in range(num_ranks)
        ]

    def clock(self) -> float:
        return self.now_s

    def duration(self, number: int, works: Sequence[RankWork]) -> float:
        self.asked.append((number, list(works)))
        return float(max(work.prefill_tokens for work in works))

    def rung(self) -> list[int]:
        """Ranks whose bells rang since the last time."""
        ready = set(select.select(self.bells, [], [], 0)[0])
        for bell in ready:
            os.eventfd_read(bell)
        return [rank for rank, bell in enumerate(self.bells) if bell in ready]


@pytest.fixture
def three() -> Iterator[Ranks]:
    with contextlib.ExitStack() as owner:
        yield Ranks(owner, 3)


def test_a_pass_begins_with_the_last_rank_and_ends_for_all_at_once(three: Ranks) -> None:
    first, second, third = three.ranks
    assert first.enter(WORK) == 1
    three.now_s = 101.0
    assert third.enter(IDLE) == 1
    assert not three.asked and first.look() is None and first.over(1) is None
    three.now_s = 103.0
    assert second.enter(RankWork(prefill_tokens=4)) == 1
    assert three.asked == [(1, [WORK, RankWork(prefill_tokens=4), IDLE])]
    assert three.rung() == [0, 1, 2]
    assert [rank.look() for rank in three.ranks] == [113.0] * 3
    three.now_s = 112.9
    assert not any(rank.over(1) for rank in three.ranks)
    three.now_s = 113.0
    assert [rank.over(1) for rank in three.ranks] == [Ran(1, 103.0, 10.0)] * 3


def test_with_stages_a_pass_follows_the_one_before_once_the_first_is_free() -> None:
    with contextlib.ExitStack() as owner:
        staged = Ranks(owner, 2, num_stages=2)
        first, second = staged.ranks
        assert first.enter(WORK) == 1
        assert first.opens_s() == math.inf, "it has not begun"
        second.enter(IDLE)
        assert [rank.look() for rank in staged.ranks] == [110.0] * 2
        assert [rank.opens_s() for rank in staged.ranks] == [105.0] * 2
        staged.now_s = 105.0
        assert first.enter(RankWork(prefill_tokens=4)) == second.enter(WORK) == 2
        assert [rank.look() for rank in staged.ranks] == [115.0] * 2
        staged.now_s = 110.0
        assert [rank.over(1) for rank in staged.ranks] == [Ran(1, 100.0, 10.0)] * 2
        assert first.over(2) is None and first.opens_s() == 110.0
        first.enter(WORK)
        staged.now_s = 115.0
        assert first.over(2) == Ran(2, 110.0, 5.0), "told from the end of the one before"


def test_only_ranks_that_sleep_are_called_and_only_once(three: Ranks) -> None:
    first, second, third = three.ranks
    assert not second.called(0) and not third.called(0)
    first.enter(WORK)
    assert three.rung() == [1, 2]
    assert second.look() == three.now_s, "its loop is to be woken now"
    assert second.called(0) and third.called(0)
    second.enter(IDLE)
    assert three.rung() == []
    third.enter(WORK)
    assert three.rung() == [0, 1, 2]


def test_a_rank_that_is_awake_finds_the_others_waiting(three: Ranks) -> None:
    first, second, third = three.ranks
    third.called(0)
    first.enter(WORK)
    assert three.rung() == [2], "the second one has not looked for work yet: it needs no bell"
    assert second.called(0)


def test_who_entered_is_not_called_into_the_same_pass(three: Ranks) -> None:
    first, second, _ = three.ranks
    first.enter(WORK)
    second.enter(WORK)
    assert first.look() is None and second.look() is None


def test_the_next_pass_gathers_only_when_the_last_one_is_over(three: Ranks) -> None:
    for rank in three.ranks:
        rank.enter(WORK)
    assert all(rank.look() == 110.0 and rank.look() is None for rank in three.ranks)
    three.now_s = 111.0
    assert not any(rank.called(0) for rank in three.ranks)
    assert three.rung() == [0, 1, 2]
    assert three.ranks[1].enter(IDLE) == 2
    assert three.rung() == [0, 2]
    assert three.ranks[0].enter(WORK) == three.ranks[2].enter(IDLE) == 2
    assert three.asked[1] == (2, [WORK, IDLE, IDLE])
    assert three.ranks[1].over(2) is None
    assert three.ranks[1].look() == 121.0


def test_a_rank_of_its_own_needs_nobody() -> None:
    with contextlib.ExitStack() as owner:
        alone = Ranks(owner, 1)
        (rank,) = alone.ranks
        assert not rank.called(0) and rank.enter(WORK) == 1
        assert alone.rung() == [0] and rank.look() == 110.0


def test_a_rank_that_leaves_is_waited_for_by_nobody(three: Ranks) -> None:
    """The pass that gathers still runs, with all of them, and none after it."""
    first, second, third = three.ranks
    first.enter(WORK)
    assert second.leave()
    assert second.enter(IDLE) == 1
    assert not second.leave() and not first.leave() and third.leave()
    assert third.enter(WORK) == 1
    assert three.asked == [(1, [WORK, IDLE, WORK])]
    for rank in three.ranks:
        assert not rank.leave() and not rank.called(0)
        with pytest.raises(ShuttingDown, match="a rank of this instance has left"):
            rank.enter(WORK)


def test_no_pass_begins_once_a_rank_has_left(three: Ranks) -> None:
    first, second, _ = three.ranks
    assert not first.leave()
    with pytest.raises(ShuttingDown):
        second.enter(WORK)
    assert three.rung() == [] and not second.leave()


def test_a_follower_takes_no_part_among_ranks() -> None:
    """It would hear its leader's bell, which then did not: passes began a second late."""
    with contextlib.ExitStack() as owner:
        fds = make_lockstep(4)
        owner.callback(fds.close)
        team = {"ep": 2, "pp": 2, "board_fd": fds.board, "bell_fds": fds.bells}
        found = [ranks_of(default_spec(rank=rank, **team)) for rank in range(4)]
        assert [one is NO_RANKS for one in found] == [False, True, False, True]


def test_passes_that_overlap_are_timed_one_behind_the_other() -> None:
    """As stages have them: the second begins while the first is under way."""
    times_s = iter([1.0, 2.0, 5.0, 6.0])
    with contextlib.ExitStack() as owner:
        alone = Ranks(owner, 1)
        ranks = InStep(alone.ranks[0], Alarm(alone.bells[0]), lambda: next(times_s))
        first, second = ranks.enter(WORK), ranks.enter(WORK)
        assert ranks.ran(first) == Ran(1, 1.0, 4.0)
        assert ranks.ran(second) == Ran(2, 5.0, 1.0)


@pytest.mark.parametrize("heard", [True, False])
def test_nobody_begins_a_pass_before_all_are_in_the_last_one(three: Ranks, heard: bool) -> None:
    """A stage without experts is done with one, and could go on to the next, before others come."""
    first, second, third = three.ranks
    ranks = InStep(first, Alarm(three.bells[0]))
    assert ranks.opens_s() == -math.inf
    ranks.enter(WORK)
    second.enter(WORK)
    assert ranks.opens_s() == math.inf
    third.enter(WORK)
    assert not heard or first.look()
    assert ranks.opens_s() == -math.inf
    second.enter(WORK)
    assert ranks.opens_s() == -math.inf, "that gathers without us"


def test_who_hears_late_of_a_pass_still_hears_of_it(three: Ranks) -> None:
    """The others may be in the next one before its bell is heard."""
    first, second, third = three.ranks
    for rank in three.ranks:
        rank.enter(WORK)
    first.look()
    three.now_s = 111.0
    first.enter(WORK)
    assert second.look() == 110.0 and second.over(1) == Ran(1, 100.0, 10.0)
    assert second.look() == 111.0 and second.called(0)


class Loop(threading.Thread):
    """A step loop without anything but passes: has work as its random numbers say."""

    def __init__(self, lockstep: Lockstep, bell: int, seed: int, num_passes: int) -> None:
        super().__init__(daemon=True)
        self.ran: list[Ran] = []
        self._lockstep = lockstep
        self._woken = threading.Semaphore(0)
        self._random = Random(seed)
        self._share = 0.0 if seed else 1.0  # the first rank always has work, so no pass is missing
        self._num_passes = num_passes
        Alarm(bell).start(lockstep.look, self._woken.release)

    def run(self) -> None:
        number = 0
        while len(self.ran) < self._num_passes:
            if number and (ran := self._lockstep.over(number)):
                self.ran.append(ran)
                number = 0
                continue
            has_work = self._random.random() < self._share
            if not number and (has_work or self._lockstep.called(0)):
                number = self._lockstep.enter(WORK if has_work else IDLE)
            assert self._woken.acquire(timeout=PATIENCE_S), "nobody woke this rank"
            self._share = 0.5 if self._share < 1.0 else 1.0


def test_no_rank_is_forgotten_however_they_come_and_go() -> None:
    num_ranks, num_passes = 4, 300
    with contextlib.ExitStack() as owner:
        fds = make_lockstep(num_ranks)
        owner.callback(fds.close)
        factors = Random(1)

        def duration(number: int, works: Sequence[RankWork]) -> float:
            return factors.choice((0.0, 1e-4))

        loops = [
            Loop(
                Lockstep(Board(fds.board, num_ranks), rank, fds.bells, duration),
                os.dup(bell),  # the alarm's thread outlives the test
                rank,
                num_passes,
            )
            for rank, bell in enumerate(fds.bells)
        ]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join(PATIENCE_S)
        assert [ran.number for ran in loops[0].ran] == list(range(1, num_passes + 1))
        assert all(loop.ran == loops[0].ran for loop in loops)


def test_an_alarm_wakes_at_each_of_its_times() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    woken = threading.Semaphore(0)
    now_s = 1.0
    alarm = Alarm(bell, clock=lambda: now_s)
    looks = iter([None, now_s])
    alarm.start(lambda: next(looks, None), woken.release)
    alarm.wake_at(1.02)
    alarm.wake_at(1.01)
    for next_s in (1.01, 1.02, 1.02):
        assert woken.acquire(timeout=PATIENCE_S)
        assert not woken.acquire(blocking=False)
        now_s = next_s
