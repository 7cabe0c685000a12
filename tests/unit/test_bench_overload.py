"""The overload benchmark's figures and verdicts, from samples that are known."""

import os
from typing import Any

import pytest

from bench.overload.phases import Figures, Phase, Span, figures, schedule
from bench.overload.tables import MOST_GROWTH_MIB, aims, row, values
from bench.watch import Look, look
from nodeserve.loadgen.measure import Punctuality
from nodeserve.loadgen.records import Job, Sample
from nodeserve.plan.goodput import Slo
from nodeserve.plan.records import Arrival
from nodeserve.plan.requests import Requests, Source

SLO = Slo(0.5, 0.05)
PUNCTUAL = Punctuality(0.0, 0.0, 0.0, 0.0, 0.0, ())
LATE = Punctuality(0.0, 0.0, 0.0, 0.2, 0.0, ("20% of the requests were sent over 10 ms late",))
MIB = 2**20


def test_phases_follow_each_other_with_the_same_requests() -> None:
    phases = [Phase("a", 10.0, 4.0), Phase("b", 200.0, 3.0), Phase("c", 10.0, 2.0, 1.0)]
    arrivals, spans = schedule(Requests(Source("synthetic(lognormal:100,8)")), phases)
    assert [span.phase for span in spans] == phases
    times = [one.arrived_s for one in arrivals]
    assert times == sorted(times)
    for span, num in zip(spans, (40, 600, 20), strict=True):
        mine = [time_s for time_s in times if span.begins_s <= time_s < span.ends_s]
        assert len(mine) == pytest.approx(num, rel=0.3)
        assert min(mine) == pytest.approx(span.begins_s)
    before = max(time_s for time_s in times if time_s < spans[2].begins_s)
    assert spans[2].begins_s >= before + 1.0, "the pause"


def sample(number: int, due_s: float, ttft_s: float, error: str | None = None) -> Sample:
    one = Sample(Job(number, Arrival(due_s, 10, 3)), due_s, due_s, error=error)
    if error is None:
        one.times, one.counts = [due_s + ttft_s, due_s + ttft_s + 0.02], [1, 2]
        one.ended_s = one.times[-1]
    else:
        one.ended_s, one.retry_after_s = due_s + 0.001, 0.5
    return one


def test_figures_are_of_the_phase_alone_and_refusals_are_no_misses() -> None:
    span = Span(Phase("x", 5.0, 10.0), 2.0, 12.0)
    samples = [
        sample(0, 1.0, 0.1),  # before it
        sample(1, 2.5, 0.1),  # settles
        sample(2, 4.0, 0.1),
        sample(3, 5.0, 0.9),  # late
        sample(4, 6.0, 0.0, "overloaded"),
        sample(5, 7.0, 0.0, "overloaded"),
        sample(6, 8.0, 0.0, "timeout"),
        sample(7, 12.0, 0.1),  # behind it
    ]
    samples[5].retry_after_s = None
    found = figures(span, samples, SLO, settle_s=1.0)
    assert (found.num_offered, found.num_accepted, found.num_good) == (5, 3, 1)
    assert found.attained == pytest.approx(1 / 3) and found.attained_of_all == 0.2
    assert found.good_per_s == pytest.approx(1 / 9)
    assert found.refused_s == pytest.approx((0.001, 0.001))
    assert found.num_without_retry == 1 and found.errors == {"timeout": 1}
    assert "x" in row(found) and values(found)["accepted"] == 3


def phase(accepted: int, good: int, offered: int = 1000, **other: Any) -> Figures:
    pair = (0.001, 0.002)
    given: dict[str, Any] = {"num_without_retry": 0, "errors": {}, "refused_s": pair, **other}
    return Figures(Phase("x", 10.0, 10.0), offered, accepted, good, pair, pair, pair, **given)


def looks(*mib: float, num_fds: int = 9) -> list[Look]:
    """At the seconds 0, 10, 20 and so on."""
    return [Look(10.0 * at, int(one * MIB), num_fds, 1.0 * at) for at, one in enumerate(mib)]


FLOOD = Span(Phase("flood", 10.0, 60.0), 0.0, 60.0)
CALM, FLOODED = phase(1000, 1000), phase(1000, 950, 20_000)
STEADY = looks(50, 60, 60, 60, 60, 60, 60, 60)


def missed(
    found: tuple[Figures, Figures, Figures],
    seen: list[Look] = STEADY,
    late: tuple[Punctuality, Punctuality] = (PUNCTUAL, PUNCTUAL),
) -> list[str]:
    return [text for text, met in aims(found, seen, late, FLOOD) if not met]


def test_what_is_promised_is_met() -> None:
    assert missed((CALM, FLOODED, CALM)) == []


@pytest.mark.parametrize(
    ("under", "words"),
    [
        (phase(1100, 950, 20_000), "accepted ones in time"),
        (phase(890, 890, 20_000), "as many good ones"),
        (phase(1000, 950, 1000), "refused at once"),
        (phase(1000, 950, 20_000, refused_s=(0.001, 0.06)), "refused at once"),
        (phase(1000, 950, 20_000, num_without_retry=1), "when to try again"),
        (phase(1000, 950, 20_000, errors={"internal": 1}), "no other error"),
    ],
)
def test_what_is_not_kept_is_said(under: Figures, words: str) -> None:
    (text,) = missed((CALM, under, CALM))
    assert words in text


def test_service_after_it_is_as_before() -> None:
    (text,) = missed((CALM, FLOODED, phase(1000, 880)))
    assert "a second later" in text


def test_memory_may_grow_for_ten_seconds_and_hardly_after_them() -> None:
    grown = looks(50, 60, 60, 60 + MOST_GROWTH_MIB + 0.1, 60, 60, 60, 60)
    (text,) = missed((CALM, FLOODED, CALM), grown)
    assert "memory grows" in text


def test_descriptors_that_stay_open_and_clients_that_are_late() -> None:
    leaking = [*STEADY[:4], *(one._replace(num_fds=10) for one in STEADY[4:])]
    (text,) = missed((CALM, FLOODED, CALM), leaking)
    assert "9 to 10" in text
    (text,) = missed((CALM, FLOODED, CALM), late=(PUNCTUAL, LATE))
    assert "20% of the requests" in text


def test_a_look_at_oneself() -> None:
    seen = look(os.getpid())
    assert seen.rss_bytes > MIB and seen.num_fds > 2 and seen.cpu_s > 0.0
