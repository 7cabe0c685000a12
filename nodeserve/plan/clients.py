"""Closed loops in a simulation: clients that send a request when their last one has ended."""

import math
from collections.abc import Sequence

from nodeserve.errors import ConfigError
from nodeserve.plan.lives import Life
from nodeserve.plan.records import Arrival, Outcome, Scenario
from nodeserve.plan.simulator import Simulation


def simulate_clients(
    scenario: Scenario, requests: Sequence[Arrival], num_clients: int, spread_s: float
) -> Outcome:
    """Serve `requests` in their order, so many at a time, whatever their times of arrival. The
    first ones come evenly over `spread_s`. ConfigError without a client."""
    if num_clients < 1:
        raise ConfigError(f"{num_clients} clients: use 1 or more")
    first = [number * spread_s / num_clients for number in range(num_clients)]
    times = [*first, *[math.inf] * len(requests)]  # of all but the first: not known yet
    timed = [one._replace(arrived_s=time_s) for one, time_s in zip(requests, times, strict=False)]
    return _Clients(scenario, timed, num_clients).run()


class _Clients(Simulation):
    def __init__(self, scenario: Scenario, arrivals: Sequence[Arrival], num_clients: int) -> None:
        super().__init__(scenario, arrivals)
        self._num_first = self._num_sent = min(num_clients, len(arrivals))

    def _expect_arrival(self) -> None:
        if self.num_arrived < self._num_first:
            super()._expect_arrival()

    def _over(self, life: Life, outcome: str) -> None:
        super()._over(life, outcome)
        if self._num_sent < len(self.arrivals):
            now_s, place = self.clock.now_s, self._num_sent
            self.arrivals[place] = self.arrivals[place]._replace(arrived_s=now_s)
            self._num_sent += 1
            self.clock.at(now_s, self._arrive)
