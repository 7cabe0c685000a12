"""Deaths in a simulation, and how they are found out.

A killed instance is silent: it computes nothing and answers nothing. It is declared dead when it
has left probes unanswered, or after a longer silence even if nobody asked.
"""

from collections.abc import Callable, Sequence

from nodeserve.errors import ConfigError
from nodeserve.plan.clock import Clock
from nodeserve.plan.instances import Instance
from nodeserve.plan.records import Faults
from nodeserve.types import Load

PROBE_TIMEOUT_S = 0.2
NUM_PROBES = 3  # unanswered ones in a row that make an instance dead
HEARTBEAT_S = 5.0  # after so much silence it is dead even if nobody asked


class Supervisor:
    """`heard` is told of answers, when the accounts have their loads; `lose` of deaths, once."""

    def __init__(
        self,
        clock: Clock,
        instances: Sequence[Instance],
        transit_s: float,
        heard: Callable[[Instance], None],
        lose: Callable[[Instance], None],
    ) -> None:
        if not 0.0 <= 2 * transit_s < PROBE_TIMEOUT_S:
            raise ConfigError(
                f"a transit of {transit_s:g} s: use 0 or more and less than"
                f" {PROBE_TIMEOUT_S / 2:g}, the time that a probe has for one way"
            )
        self._clock = clock
        self._instances = instances
        self._transit_s = transit_s
        self._heard = heard
        self._lose = lose
        self._num_sent = 0
        self._probed: dict[Instance, tuple[int, int]] = {}  # the last probe, how many before it

    def expect(self, faults: Faults) -> None:
        """Kill what is to be killed, when it is time."""
        victim = faults.kill_instance
        if victim is None:
            return
        number = len(self._instances)
        if not 0 <= victim < number:
            raise ConfigError(
                f"there is no instance {victim} to kill: the layout has {number}, counted from 0"
            )
        if not faults.kill_at_s >= 0.0:
            raise ConfigError(f"an instance killed at {faults.kill_at_s:g} s: use 0 or later")
        self._clock.at(faults.kill_at_s, self._kill, self._instances[victim])

    def probe(self, instance: Instance) -> None:
        """Ask whether it lives, unless that has been asked already."""
        if instance not in self._probed:
            self._send(instance, 0)

    def _kill(self, instance: Instance) -> None:
        instance.alive = False
        self._clock.after(HEARTBEAT_S, self._dead, instance)

    def _send(self, instance: Instance, num_unanswered: int) -> None:
        self._num_sent += 1
        probe = self._probed[instance] = (self._num_sent, num_unanswered)
        self._clock.after(self._transit_s, self._arrived, instance)
        self._clock.after(PROBE_TIMEOUT_S, self._late, (instance, probe))

    def _arrived(self, instance: Instance) -> None:
        if instance.alive:
            loads = [rank.load() for rank in instance.ranks]
            self._clock.after(self._transit_s, self._answered, (instance, loads))

    def _answered(self, told: tuple[Instance, list[Load]]) -> None:
        instance, loads = told
        if instance.lost:
            return
        self._probed.pop(instance, None)
        for rank, load in zip(instance.ranks, loads, strict=True):
            rank.unit.account.report(load)
        self._heard(instance)

    def _late(self, told: tuple[Instance, tuple[int, int]]) -> None:
        instance, probe = told
        if self._probed.get(instance) != probe:
            return  # answered since
        num_unanswered = probe[1] + 1
        if num_unanswered == NUM_PROBES:
            self._dead(instance)
        else:
            self._send(instance, num_unanswered)

    def _dead(self, instance: Instance) -> None:
        if instance.lost:
            return
        instance.alive, instance.lost = False, True
        self._lose(instance)
