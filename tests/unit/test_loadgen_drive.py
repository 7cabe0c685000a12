"""What a client that could not keep time says of itself."""

import pytest

from nodeserve.loadgen.drive import TICK_S, Driver, Load, lags_of
from nodeserve.loadgen.measure import punctuality
from nodeserve.loadgen.records import Job, Sample
from nodeserve.loadgen.targets import About
from nodeserve.plan.records import Arrival


class Freezing:
    """A target whose requests stop the client for a while: its clock jumps."""

    def __init__(self, frozen_s: float) -> None:
        self.frozen_s = frozen_s
        self.driver: Driver | None = None

    async def open(self) -> About:
        raise AssertionError("nobody asks")

    def payload(self, job: Job, run: int) -> bytes:
        return b""

    async def ask(self, job: Job, payload: bytes, sample: Sample, began_s: float) -> None:
        assert self.driver is not None
        self.driver._began_s -= self.frozen_s

    async def close(self) -> None: ...


async def test_a_client_that_stood_still_was_late_for_all_of_that_time() -> None:
    """Ten seconds of punctual wake-ups beside it do not hide a second."""
    target, samples = Freezing(1.0), list[Sample]()
    target.driver = driver = Driver(target, 0.0, samples.append)
    driver._began_s = driver._now_s()
    await driver.open_loop([Load(Job(0, Arrival(0.0, 1, 1)), b"")], 60.0)
    assert [one.error for one in samples] == [None]
    assert sum(one > 0.010 for one in driver.lags_s) >= 95
    judged = punctuality(samples, [*driver.lags_s, *[0.0] * 1000])
    assert not judged.valid and "woke up" in judged.reasons[0]


def test_a_late_wake_up_stands_for_those_that_never_came() -> None:
    assert lags_of(-0.001) == [0.0] and lags_of(0.004) == [0.004]
    assert lags_of(0.035) == pytest.approx([0.035, 0.025, 0.015, 0.005])
    assert len(lags_of(1.0)) == pytest.approx(1.0 / TICK_S, abs=1)
