"""Health: what is true of the loop and the workers, and nothing that they said long ago."""

import pytest

from nodeserve.coordinator.health import (
    LATE_S,
    NUM_LAGS,
    PULSE_S,
    SILENT_S,
    Pulse,
    Seat,
    health_of,
    seat_of,
    trouble_of,
)
from nodeserve.coordinator.link import WorkerLink
from nodeserve.types import Role

FINE = ""


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# ---- the pulse


def test_a_loop_that_was_held_up_says_so_until_it_is_long_ago() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.beat()
    clock.now_s += PULSE_S
    pulse.beat()
    assert pulse.lag_s == 0.0
    clock.now_s += 3600.0
    assert pulse.lag_s == pytest.approx(3600.0 - PULSE_S), "before any pulse could say so"
    pulse.beat()
    for _ in range(NUM_LAGS - 1):
        clock.now_s += PULSE_S
        pulse.beat()
        assert pulse.lag_s > LATE_S
    clock.now_s += PULSE_S
    pulse.beat()
    assert pulse.lag_s == 0.0


# ---- a worker


async def test_silence_is_trouble_and_a_long_pass_is_none() -> None:
    link = WorkerLink(0, Role.MIXED, None, -1)  # type: ignore[arg-type]
    link.state = "ready"
    assert trouble_of(link) == FINE
    link.watchdog.silent_s = SILENT_S - 1.0
    assert trouble_of(link) == FINE
    link.watchdog.silent_s = 7.0
    assert trouble_of(link) == "has been silent for 7 s"
    link.watchdog.stepped(1, 3.0)
    assert trouble_of(link) == FINE
    link.watchdog.silent_s = 13.0
    assert trouble_of(link) == "has been silent for 13 s"


async def test_who_is_gone_is_told_with_the_reason() -> None:
    link = WorkerLink(0, Role.MIXED, None, -1)  # type: ignore[arg-type]
    assert trouble_of(link) == "is starting"
    link.state, link.reason = "restarting", "mixed worker 0 was killed by SIGKILL"
    assert trouble_of(link) == "is restarting (mixed worker 0 was killed by SIGKILL)"


async def test_a_worker_that_stands_in_is_there_for_both() -> None:
    link = WorkerLink(0, Role.PREFILL, None, -1)  # type: ignore[arg-type]
    link.state = "ready"
    assert (seat_of(link).prefills, seat_of(link).decodes) == (True, False)
    link.stands_in = True
    assert (seat_of(link).prefills, seat_of(link).decodes) == (True, True)


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
