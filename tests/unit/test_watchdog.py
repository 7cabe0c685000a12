"""When a worker counts as hung: no turn of its loop, or work and no step, for its limit."""

import pytest

from nodeserve.policy.watchdog import FIRST_LIMIT_S, LEAST_LIMIT_S, SLACK, Watchdog

FULL = 1000  # tokens in the largest step that there may be


def looks(dog: Watchdog, *, beats: list[int], busy: bool) -> list[bool]:
    """Whether it is found hung at looks one second apart."""
    return [dog.look(count, busy, 1.0, FULL) is not None for count in beats]


def test_an_idle_worker_has_to_turn() -> None:
    dog = Watchdog(3.0)
    assert looks(dog, beats=[1, 2, 3, 4, 5, 6, 7, 8], busy=False) == [False] * 8
    assert looks(dog, beats=[8, 8, 8, 8, 9], busy=False) == [False, False, False, True, False]


def test_a_busy_worker_has_to_get_on() -> None:
    dog = Watchdog(3.0)
    assert looks(dog, beats=[1, 2, 3, 4], busy=True) == [False, False, False, True]
    dog.stepped(1, 0.1)
    assert looks(dog, beats=[5, 6, 7], busy=True) == [False] * 3
    dog.progressed()
    assert looks(dog, beats=[8, 9, 10], busy=True) == [False] * 3
    assert looks(dog, beats=[11], busy=False) == [False], "nothing to do is no lack of progress"
    assert looks(dog, beats=[12, 13, 14, 15], busy=True) == [False, False, False, True]


def test_the_words_say_which() -> None:
    dog = Watchdog(2.0)
    looks(dog, beats=[1, 2, 3], busy=False)
    assert "has not turned for 3.0 s" in str(dog.look(3, False, 3.0, FULL))
    assert "has done none for 3.0 s" in str(dog.look(4, True, 3.0, FULL))


def test_the_first_step_has_a_long_time() -> None:
    assert Watchdog().limit_s(FULL) == FIRST_LIMIT_S
    assert Watchdog(0.5).limit_s(FULL) == 0.5


@pytest.mark.parametrize(
    ("steps", "limit_s"),
    [
        ([(10, 0.001)], LEAST_LIMIT_S),
        ([(10, 0.1)], SLACK * 10.0),  # a full one may take 100 times as long
        ([(1, 1.0)], FIRST_LIMIT_S),  # but one token says little
        ([(10, 0.1), (FULL, 0.5)], LEAST_LIMIT_S),  # now it is known
        ([(FULL, 5.0), (1, 0.1)], SLACK * 5.0),
        ([(FULL, 5.0), (1, 60.0)], SLACK * 60.0),  # whatever it was, it took that long
        ([(FULL, 5.0), (FULL, 8.0), (FULL, 5.0)], SLACK * 8.0),
    ],
)
def test_the_limit_follows_from_what_steps_take(
    steps: list[tuple[int, float]], limit_s: float
) -> None:
    dog = Watchdog()
    for num_tokens, seconds in steps:
        dog.stepped(num_tokens, seconds)
    assert dog.limit_s(FULL) == pytest.approx(limit_s)
