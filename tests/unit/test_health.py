"""Health: what is true of the loop and the workers, and nothing that they said long ago."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from nodeserve.coordinator.health import (
    LATE_S,
    NUM_LAGS,
    PULSE_S,
    SILENT_S,
    Pulse,
    Seat,
    health_of,
    trouble_of,
)
from nodeserve.coordinator.link import WorkerLink
from nodeserve.types import Role

FINE = ""


@dataclass
class Outbox:
    beats: int = 0


@dataclass
class Channel:
    outbox: Outbox = field(default_factory=Outbox)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def link_of(index: int = 0, role: Role = Role.MIXED) -> WorkerLink:
    link = WorkerLink(index, role, Channel(), -1)  # type: ignore[arg-type]
    link.state = "ready"
    return link


class Felt:
    """A pulse, and the workers and the clock that it feels."""

    def __init__(self, num_workers: int = 1) -> None:
        self.clock, self.links = Clock(), [link_of(index) for index in range(num_workers)]
        self.pulse = Pulse(self.links, self.clock)

    def pass_time(self, num_pulses: int, silent: Sequence[int] = ()) -> None:
        for _ in range(num_pulses):
            self.clock.now_s += PULSE_S
            for link in self.links:
                link.channel.outbox.beats += link.index not in silent  # type: ignore[misc]
            self.pulse.beat()


# ---- the pulse


async def test_a_worker_that_turns_is_not_silent_however_long_it_idles() -> None:
    felt = Felt()
    felt.pass_time(1000)
    assert felt.pulse.silent_s(felt.links[0]) == 0.0 and felt.pulse.lag_s == 0.0


async def test_silence_is_counted_until_the_next_beat() -> None:
    felt = Felt(2)
    felt.pass_time(3)
    felt.pass_time(7, silent=[1])
    assert [felt.pulse.silent_s(link) for link in felt.links] == [0.0, 7 * PULSE_S]
    felt.pass_time(1)
    assert [felt.pulse.silent_s(link) for link in felt.links] == [0.0, 0.0]


async def test_a_node_that_was_stopped_has_late_pulses_and_no_silent_worker() -> None:
    felt = Felt()
    felt.pass_time(3)
    felt.clock.now_s += 3600.0
    assert felt.pulse.lag_s == pytest.approx(3600.0 - PULSE_S), "before any pulse could say so"
    felt.pulse.beat()
    assert felt.pulse.silent_s(felt.links[0]) == PULSE_S
    felt.pass_time(1)
    assert felt.pulse.silent_s(felt.links[0]) == 0.0 and felt.pulse.lag_s > LATE_S
    felt.pass_time(NUM_LAGS)
    assert felt.pulse.lag_s == 0.0


async def test_a_worker_that_took_anothers_place_begins_anew() -> None:
    felt = Felt()
    felt.pass_time(3)
    felt.pass_time(9, silent=[0])
    felt.links[0] = link_of()
    felt.pass_time(1, silent=[0])
    assert felt.pulse.silent_s(felt.links[0]) == 0.0


# ---- a worker


async def test_a_long_pass_is_no_trouble() -> None:
    link = link_of()
    assert trouble_of(link, SILENT_S - 1.0) == FINE
    assert trouble_of(link, 7.0) == "has been silent for 7 s"
    link.counters.step_s = 3.0
    assert trouble_of(link, 7.0) == FINE
    assert trouble_of(link, 13.0) == "has been silent for 13 s"
    link.state = "lost"
    assert trouble_of(link, 0.0) == "is lost"


# ---- the node


def seats(*rows: tuple[str, int, str]) -> list[Seat]:
    return [
        Seat(f"{kind} {place}", instance, kind != "d", kind != "p", trouble)
        for place, (kind, instance, trouble) in enumerate(rows)
    ]


LOST = "is lost"
CASES = {
    "all well": (seats(("p", 0, FINE), ("d", 1, FINE)), "ready", []),
    "one of two": (
        seats(("p", 0, FINE), ("d", 1, FINE), ("d", 2, LOST)),
        "degraded",
        ["d 2 is lost"],
    ),
    "the last that decodes": (
        seats(("p", 0, FINE), ("d", 1, LOST)),
        "not ready",
        ["nobody is there for decode", "d 1 is lost"],
    ),
    "a mixed one is there for both": (
        seats(("p", 0, LOST), ("d", 1, LOST), ("m", 2, FINE)),
        "degraded",
        ["p 0 is lost", "d 1 is lost"],
    ),
    "ranks need each other": (
        seats(("p", 0, FINE), ("p", 0, LOST), ("d", 1, FINE)),
        "not ready",
        ["nobody is there for prefill", "p 1 is lost"],
    ),
    "nobody": (
        seats(("m", 0, LOST)),
        "not ready",
        ["nobody is there for prefill", "nobody is there for decode", "m 0 is lost"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_state_follows_from_who_can_make_a_step(name: str) -> None:
    row, state, reasons = CASES[name]
    health = health_of(row, 0.0, stopping=False)
    assert (health["state"], health["reasons"]) == (state, reasons)
    assert health["ready"] == (state in ("ready", "degraded")) and health["live"]


def test_a_loop_that_was_late_and_doubts_degrade() -> None:
    row = CASES["all well"][0]
    assert health_of(row, 0.9 * LATE_S, stopping=False)["state"] == "ready"
    late = health_of(row, 2.5, stopping=False, doubts=["instance 0 is slow"])
    assert late["state"] == "degraded" and late["loop_lag_ms"] == 2500.0
    assert late["reasons"] == [
        "instance 0 is slow",
        "the server's loop was 2.5 s late within the last 10 s",
    ]


def test_a_server_that_stops_is_not_ready() -> None:
    health = health_of(CASES["all well"][0], 0.0, stopping=True)
    assert (health["state"], health["ready"]) == ("stopping", False)
    assert health["reasons"] == ["it was told to stop and takes no new requests"]
