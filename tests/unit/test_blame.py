"""Which stage is to blame: known answers."""

import pytest

from nodeserve import blame
from nodeserve.blame import culprit, expected, stages_of
from nodeserve.types import Slo, Timings

USUAL = {blame.BUFFER: 0.01, blame.PREFILL: 0.2, blame.DECODE: 0.02}
BOTH = Slo(0.5, 0.05)


def blamed(timings: Timings, missed: tuple[str, ...], num_gaps: int = 10) -> str:
    return culprit(stages_of(timings), missed, expected(USUAL, BOTH, num_gaps))


def test_stages_add_up_to_the_two_times() -> None:
    timings = Timings(
        *(1.0, 0.01, 0.02, 0.3, 0.004),
        handoff_wait_s=0.5,
        handoff_s=0.1,
        decode_s=2.0,
        lost_before_s=0.25,
        lost_after_s=0.4,
    )
    before, after = stages_of(timings)
    assert sum(before.values()) == pytest.approx(timings.ttft_s)
    assert sum(after.values()) == pytest.approx(timings.decode_s)
    assert before[blame.BUFFER] == 0.75 and before[blame.PREEMPTION] == 0.25
    assert before[blame.DEVICE_WAIT] == pytest.approx(0.03)
    assert after[blame.DECODE] == pytest.approx(1.0) and after[blame.PREEMPTION] == 0.4


@pytest.mark.parametrize(
    ("word", "timings"),
    [
        (blame.BUFFER, Timings(scheduler_wait_s=0.3, prefill_s=0.45)),
        (blame.PREFILL, Timings(scheduler_wait_s=0.3, prefill_s=0.6)),
        (blame.DEVICE_WAIT, Timings(transit_s=0.2, device_wait_s=0.2, prefill_s=0.5)),
        (blame.RETURN, Timings(return_s=0.4, prefill_s=0.5)),
        (blame.PREEMPTION, Timings(scheduler_wait_s=0.6, lost_before_s=0.5, prefill_s=0.2)),
    ],
)
def test_a_late_first_token_is_a_matter_of_what_was_before(word: str, timings: Timings) -> None:
    assert blamed(timings, ("ttft",)) == word


@pytest.mark.parametrize(
    ("word", "timings"),
    [
        (blame.DECODE, Timings(scheduler_wait_s=9.0, handoff_wait_s=0.3, decode_s=0.9)),
        (blame.HANDOFF_WAIT, Timings(handoff_wait_s=0.6, handoff_s=0.1, decode_s=0.9)),
        (blame.HANDOFF, Timings(handoff_wait_s=0.1, handoff_s=0.6, decode_s=0.9)),
        (blame.PREEMPTION, Timings(lost_after_s=0.6, decode_s=0.9)),
    ],
)
def test_slow_tokens_are_a_matter_of_what_came_after(word: str, timings: Timings) -> None:
    assert blamed(timings, ("tpot",)) == word


def test_who_misses_both_is_late_by_the_sum() -> None:
    timings = Timings(scheduler_wait_s=0.6, prefill_s=0.2, decode_s=0.7)
    assert blamed(timings, ("ttft", "tpot")) == blame.BUFFER
    assert blamed(timings, ("e2e",), num_gaps=1) == blame.DECODE


def test_what_is_usual_is_no_excuse_beyond_the_limit() -> None:
    """A limit that nobody could meet: the longest stage is to blame, not the noise on it."""
    spent = stages_of(Timings(scheduler_wait_s=0.012, prefill_s=0.199, decode_s=0.21))
    strict = expected(USUAL, Slo(0.1, 0.001), 10)
    assert culprit(spent, ("ttft",), strict) == blame.PREFILL
    assert culprit(spent, ("tpot",), strict) == blame.DECODE
    assert culprit(spent, ("ttft",), expected(USUAL, Slo(0.21), 10)) == blame.BUFFER


def test_decoding_may_take_its_limit_while_nothing_is_usual() -> None:
    spent = stages_of(Timings(handoff_wait_s=0.2, decode_s=0.7))
    assert culprit(spent, ("tpot",), expected({}, BOTH, 10)) == blame.HANDOFF_WAIT
    assert culprit(spent, ("tpot",), expected({}, Slo(0.5), 10)) == blame.DECODE
