"""What one connection may ask for."""

import pytest

from nodeserve.errors import Overloaded
from nodeserve.policy.metering import Meter, Quota


def taken(meter: Meter, num: int, now_s: float) -> int:
    """How many of `num` requests at one moment are let in."""
    count = 0
    for _ in range(num):
        try:
            meter.take(0, now_s)
        except Overloaded:
            continue
        count += 1
    return count


def test_without_a_rate_any_number_may_come() -> None:
    assert taken(Meter(Quota()), 10_000, 0.0) == 10_000


@pytest.mark.parametrize(("rate", "burst"), [(20.0, 20), (1.0, 1), (0.1, 1)])
def test_a_second_of_the_rate_may_come_at_once_and_then_the_rate(rate: float, burst: int) -> None:
    meter = Meter(Quota(max_rate=rate))
    assert taken(meter, 100, 50.0) == burst
    assert taken(meter, 100, 50.0 + 0.5 / rate) == 0
    assert taken(meter, 100, 50.0 + 1.01 / rate) == 1
    assert taken(meter, 100, 1e6) == burst, "a long pause is worth no more"


def test_a_refusal_says_when_to_come_back_and_that_is_true() -> None:
    meter = Meter(Quota(max_rate=4.0))
    assert taken(meter, 4, 0.0) == 4
    with pytest.raises(Overloaded, match="4 requests a second") as refused:
        meter.take(0, 0.1)
    wait_s = refused.value.retry_after_s
    assert wait_s == pytest.approx(0.15)
    assert taken(meter, 1, 0.1 + (wait_s or 0.0) + 1e-9) == 1


def test_open_requests_are_bounded_and_cost_nothing_of_the_rate() -> None:
    meter = Meter(Quota(max_open=3, max_rate=2.0))
    for _ in range(5):
        with pytest.raises(Overloaded, match="3 requests of this connection are open") as refused:
            meter.take(3, 0.0)
        assert refused.value.retry_after_s
    assert taken(meter, 5, 0.0) == 2
