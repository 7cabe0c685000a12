"""Who may come in, who is put behind, who is refused and for how long; and how SLOs are written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeserve.config import parse_slo
from nodeserve.coordinator.admission import check_slo
from nodeserve.errors import ConfigError
from nodeserve.policy.flow import (
    LEAST_RETRY_S,
    NO_OBJECTIVE,
    RETRY_S,
    Buffered,
    FlowOptions,
    Judgement,
    Verdict,
    judge,
)
from nodeserve.policy.foresight import Forecast
from nodeserve.policy.units import Wait
from nodeserve.types import Slo

REJECT = FlowOptions(max_num_queued_reqs=10, max_num_queued_tokens=1000)
QUEUE = FlowOptions(max_num_queued_reqs=10, max_num_queued_tokens=1000, on_overload="queue")
EMPTY, SOME = Buffered(0, 0), Buffered(3, 600)


def first_in(likely_s: float, safe_s: float) -> Forecast:
    """Of the first token alone."""
    return Forecast(Wait(likely_s, 0.0), safe_s)


def token_in(likely_s: float, safe_s: float) -> Forecast:
    """Of a token, where the first one is no problem; an answer takes 4 s."""
    return Forecast(Wait(0.0, 0.0), 0.0, Wait(likely_s, 0.0), safe_s, 4.0)


HALF, TWENTIETH = Slo(ttft_s=0.5), Slo(tpot_s=0.05)
CASES = {
    "nothing known, nothing asked": (EMPTY, 100, NO_OBJECTIVE, None),
    "no SLO": (SOME, 100, NO_OBJECTIVE, Forecast(Wait(1e9, 0.0), 1e9, Wait(1e9, 0.0), 1e9)),
    "nothing forecast": (SOME, 100, Slo(0.001, 0.001), None),
    "in time": (SOME, 100, HALF, first_in(0.3, 0.4)),
    "just in time": (SOME, 100, HALF, first_in(0.3, 0.5)),
    "late most likely, but not surely": (SOME, 100, HALF, first_in(0.55, 0.5)),
    "of tokens nothing is known": (SOME, 100, TWENTIETH, first_in(0.1, 0.1)),
    "a step in time": (SOME, 100, TWENTIETH, token_in(0.04, 0.05)),
    "a number that is none": (SOME, 100, Slo(0.5, 0.5), token_in(math.nan, math.nan)),
    "the last of the tokens": (SOME, 400, NO_OBJECTIVE, None),
    "too long for the buffer, but alone": (EMPTY, 5000, NO_OBJECTIVE, None),
    "the last place": (Buffered(9, 0), 1, NO_OBJECTIVE, None),
}


@pytest.mark.parametrize("options", [REJECT, QUEUE], ids=lambda options: str(options.on_overload))
@pytest.mark.parametrize("name", CASES)
def test_what_may_come_in(name: str, options: FlowOptions) -> None:
    assert judge(options, *CASES[name]) == Judgement(Verdict.ADMIT)


FULL = {
    "requests": (Buffered(10, 10), 1, "10 requests are waiting already"),
    "tokens": (SOME, 401, "600 prompt tokens are waiting already"),
}


@pytest.mark.parametrize("options", [REJECT, QUEUE], ids=lambda options: str(options.on_overload))
@pytest.mark.parametrize("slo", [NO_OBJECTIVE, Slo(0.1), Slo(1e9, 1e9)])
@pytest.mark.parametrize(
    ("predicted_s", "retry_after_s"),
    [(None, RETRY_S), (7.0, 7.0), (0.0, LEAST_RETRY_S), (math.inf, RETRY_S)],
)
@pytest.mark.parametrize("name", FULL)
def test_memory_has_bounds_for_everybody(
    name: str,
    predicted_s: float | None,
    retry_after_s: float,
    slo: Slo,
    options: FlowOptions,
) -> None:
    buffered, num_tokens, words = FULL[name]
    forecast = None if predicted_s is None else first_in(predicted_s, predicted_s)
    judged = judge(options, buffered, num_tokens, slo, forecast)
    assert judged.verdict is Verdict.REJECT and judged.retry_after_s == retry_after_s
    assert words in judged.reason and f"try again in {retry_after_s:.1f} s" in judged.reason


@pytest.mark.parametrize(
    ("slo", "forecast", "retry_after_s", "words"),
    [
        (HALF, first_in(1.0, 2.0), 1.5, "the first token may take 2 s, the SLO is 0.5 s"),
        (HALF, first_in(0.4, 0.58), LEAST_RETRY_S, "may take 0.58 s, the SLO is 0.5 s"),
        (HALF, first_in(1.0, math.inf), RETRY_S, "may take inf s, the SLO is 0.5 s"),
        (TWENTIETH, token_in(0.04, 0.1), 2.0, "a token may take 0.1 s, the SLO is 0.05 s"),
        (TWENTIETH, token_in(0.04, 0.0501), LEAST_RETRY_S, "the SLO is 0.05 s"),
    ],
)
@pytest.mark.parametrize("buffered", [EMPTY, SOME])
def test_an_slo_that_would_be_missed(
    buffered: Buffered, slo: Slo, forecast: Forecast, retry_after_s: float, words: str
) -> None:
    refused = judge(REJECT, buffered, 100, slo, forecast)
    assert refused.verdict is Verdict.REJECT
    assert refused.retry_after_s == pytest.approx(retry_after_s)
    assert words in refused.reason and f"try again in {retry_after_s:.1f} s" in refused.reason
    queued = judge(QUEUE, buffered, 100, slo, forecast)
    assert queued.verdict is Verdict.BEST_EFFORT and queued.retry_after_s == 0.0


LIMITS = st.none() | st.floats(1e-6, 1e6)


@given(
    st.sampled_from((REJECT, QUEUE)),
    st.builds(Buffered, st.integers(0, 20), st.integers(0, 2000)),
    st.integers(1, 5000),
    st.builds(Slo, LIMITS, LIMITS),
    st.none()
    | st.builds(
        Forecast,
        st.builds(Wait, st.floats(), st.floats()),
        st.floats(),
        st.none() | st.builds(Wait, st.floats(), st.floats()),
        st.none() | st.floats(),
        st.floats(),
    ),
)
def test_what_holds_for_every_judgement(
    options: FlowOptions,
    buffered: Buffered,
    num_tokens: int,
    slo: Slo,
    forecast: Forecast | None,
) -> None:
    judged = judge(options, buffered, num_tokens, slo, forecast)
    alone = not buffered.num_requests
    if judged.verdict is not Verdict.REJECT:
        assert buffered.num_requests < options.max_num_queued_reqs
        assert alone or buffered.num_tokens + num_tokens <= options.max_num_queued_tokens
        assert judged.retry_after_s == 0.0
    else:
        assert LEAST_RETRY_S <= judged.retry_after_s < math.inf and judged.reason
    if alone and (slo == NO_OBJECTIVE or forecast is None):
        assert judged.verdict is Verdict.ADMIT


# ---- --slo


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500ms,tpot=50ms", {"ttft_ms": 500.0, "tpot_ms": 50.0}),
        ("ttft=0.5s", {"ttft_ms": 500.0}),
        ("tpot=50", {"tpot_ms": 50.0}),
        (" tpot = 12.5 ms , ttft = 2 s ", {"tpot_ms": 12.5, "ttft_ms": 2000.0}),
        ("ttft=.25s", {"ttft_ms": 250.0}),
    ],
)
def test_an_slo_is_read_into_a_requests_form(text: str, slo: dict[str, float]) -> None:
    assert parse_slo(text) == slo
    check_slo(dict(slo))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no limit; write ttft and tpot such as ttft=500ms"),
        ("ttft=500ms,", "'' is no limit"),
        ("500ms", "'500ms' is no limit"),
        ("ttft", "'ttft' is no limit"),
        ("ttft=", "'ttft=' is no limit"),
        ("ttft_ms=500", "'ttft_ms=500' is no limit"),
        ("e2e=3s", "'e2e=3s' is no limit"),
        ("ttft=5m", "'ttft=5m' is no limit"),
        ("ttft=-5ms", "'ttft=-5ms' is no limit"),
        ("ttft=nan", "'ttft=nan' is no limit"),
        ("ttft=inf", "'ttft=inf' is no limit"),
        ("ttft=1e3", "'ttft=1e3' is no limit"),
        ("ttft=500ms tpot=50ms", "is no limit"),
        ("ttft=0", "ttft must be above 0"),
        ("tpot=" + "9" * 400, "tpot must be above 0"),
        ("ttft=1s,ttft=2s", "ttft is given twice"),
    ],
)
def test_an_slo_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_slo(text)
    assert words in str(caught.value) and "--slo" in str(caught.value)
