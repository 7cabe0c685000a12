"""By when a worker must be further with its start, and in what it is late."""

import math
from collections.abc import Iterator

import pytest

from nodeserve.coordinator import startup
from nodeserve.coordinator.link import WorkerLink
from nodeserve.policy.startup import BASE_S, Start, default_timeout_s
from nodeserve.types import Role


def test_each_phase_has_its_share_from_its_last_move() -> None:
    start = Start(100.0, 1000.0)
    assert start.deadline_s == 1025.0, "a process must say something soon"
    start.move("import", 0, 1, 1010.0)
    assert start.deadline_s == 1060.0
    start.move("weights", 1, 30, 1020.0)
    start.move("weights", 1, 30, 1060.0)  # no move
    assert start.deadline_s == 1070.0
    start.move("weights", 2, 30, 1069.0)
    assert start.deadline_s == 1100.0, "the whole time is over before half of it has passed again"
    start.move("warm-up", 0, 1, 1070.0)
    assert start.deadline_s == 1100.0


def test_who_is_where_he_should_be_is_not_late_until_more_is_asked() -> None:
    start = Start(100.0, 0.0)
    start.finish()
    assert start.deadline_s == math.inf
    start.move("peers", 0, 2, 50.0)
    assert start.deadline_s == 75.0


def test_time_in_which_nobody_could_move_does_not_count() -> None:
    start = Start(100.0, 0.0)
    start.pause(3600.0)
    assert start.deadline_s == 3625.0


def test_the_words_say_where_it_stands() -> None:
    start = Start(100.0, 0.0)
    assert start.describe(7.0) == "in 'process' since 7 s, started 7 s ago"
    start.move("weights", 3, 30, 10.0)
    assert start.describe(15.0) == "in 'weights' at 3 of 30 since 5 s, started 15 s ago"
    start.move("weights", 30, 30, 20.0)
    assert start.describe(25.0) == "after 'weights' since 5 s, started 25 s ago"


def test_large_models_get_longer() -> None:
    assert default_timeout_s(0) == BASE_S
    assert default_timeout_s(140 * 10**9) == pytest.approx(BASE_S + 2800.0)


def link_of(index: int, timeout_s: float) -> WorkerLink:
    link = WorkerLink(index, Role.DECODE, None, -1)  # type: ignore[arg-type]
    link.start = Start(timeout_s, 0.0)
    return link


@pytest.fixture
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "TICK_S", 0.001)


async def test_all_who_are_late_are_named(short_ticks: None) -> None:
    links = [link_of(0, 0.004), link_of(1, 4000.0), link_of(2, 0.004)]
    times: Iterator[float] = iter(tick * 0.001 for tick in range(100))
    assert await startup.late_ones(links, lambda: next(times)) == [links[0], links[2]]


async def test_a_loop_that_stood_still_is_no_fault_of_the_workers(short_ticks: None) -> None:
    """After SIGCONT timers are due before any ring is read."""
    link = link_of(0, 400.0)
    assert link.start is not None
    times = iter([0.0, 5000.0, 5000.0, 5001.0])
    with pytest.raises(RuntimeError, match="StopIteration"):  # it asks on
        await startup.late_ones([link], lambda: next(times))
    assert link.start.deadline_s == pytest.approx(5101.0, abs=0.1)
