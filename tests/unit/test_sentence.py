"""When a run may end: what has been seen settles it."""

import pytest

from nodeserve.plan.sentence import Sentence, bounds


def missing(sentence: Sentence, num_bad: int, num_come: int) -> Sentence:
    for _ in range(num_bad):
        sentence.note(True, num_come)
    return sentence


def test_the_goal_is_out_of_reach_or_reached() -> None:
    assert bounds(0.9, 200, None) == (20, 180)
    sentence = missing(Sentence(0.9, 200), 20, 200)
    assert not sentence.is_over
    assert missing(sentence, 1, 200).is_over
    reached = Sentence(0.9, 200)
    for number in range(180):
        assert not reached.is_over, number
        reached.note(False, 200)
    assert reached.is_over
    assert (reached.tally.num_good, reached.tally.num_unknown) == (180, 20)


def test_far_too_many_misses_of_those_that_came_are_enough() -> None:
    """Of 400 that came 40 may miss; 70 are five deviations more. Of 900 it would be 135."""
    assert not missing(Sentence(0.9, 6400), 69, 400).is_over
    assert missing(Sentence(0.9, 6400), 71, 400).is_over
    assert not missing(Sentence(0.9, 6400), 134, 900).is_over
    assert missing(Sentence(0.9, 6400), 136, 900).is_over
    # All of the first few, in a burst, say nothing.
    assert not missing(Sentence(0.9, 6400), 29, 29).is_over
    assert missing(Sentence(0.9, 6400), 30, 30).is_over
    # After the last one more cannot come, whatever else arrives.
    assert missing(Sentence(0.5, 10), 6, 1000).is_over


def test_who_wants_to_be_sure_sees_it_through() -> None:
    most_bad, least_good = bounds(0.9, 6400, 0.95)
    assert most_bad > 640 and least_good > 5760
    sentence = missing(Sentence(0.9, 6400, 0.95), most_bad, most_bad)
    assert not sentence.is_over
    assert missing(sentence, 1, most_bad + 1).is_over


@pytest.mark.parametrize("num_good", [100, 3000, 5759])
def test_that_many_were_good_so_far_is_not_enough(num_good: int) -> None:
    """Memory fills, and queues grow, as long as the run lasts."""
    sentence = Sentence(0.9, 6400)
    for _ in range(num_good):
        sentence.note(False, num_good)
    assert not sentence.is_over
