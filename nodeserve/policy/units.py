"""The words of dispatch: who may take requests, what waits, what was decided."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nodeserve.policy.account import Account
from nodeserve.policy.cost import RankWork


@dataclass(slots=True, eq=False)
class Unit:
    """One DP rank, or the one worker of a plain instance: a queue and a KV pool of its own."""

    index: int  # the worker's
    instance: int
    account: Account
    decodes: bool = False  # besides prefilling: a mixed one
    num_stages: int = 1  # passes that can be under way at once


@dataclass(slots=True, eq=False)
class Waiting:
    """What dispatch needs to know of a request in the buffer.

    `hits` are tokens of its prompt that a unit has in its prefix cache already, by unit index.
    """

    request_id: int
    num_tokens: int  # to prefill
    num_blocks: int  # that they and the first new token take
    arrived_s: float
    priority: int = 0  # higher first
    best_effort: bool = False  # will miss its SLO: after those of its priority that can meet theirs
    rounds: int = 0  # departures that left it behind
    hits: Mapping[int, int] = field(default_factory=dict)


class PassDone(NamedTuple):
    """One rank's word that a pass is over; its Account has the report already."""

    step: int  # the same on all ranks of an instance
    began_s: float
    seconds: float
    work: RankWork


class Departure(NamedTuple):
    """A batch for one instance: each request and the index of its unit, in the order to send.

    Every unit is told, also with nothing for it: an instance with prompts left from the last pass
    waits for that before it begins the next, so an empty batch means to go on.
    """

    instance: int
    boarded: list[tuple[Waiting, int]]


class Decision(NamedTuple):
    """What to do now: send these batches, ask these instances whether they live, and decide again
    at `wake_s` if nothing happens before (None: nothing is waiting for a time)."""

    departures: list[Departure]
    probes: list[int]
    wake_s: float | None


class Wait(NamedTuple):
    """Seconds to a first token: until its own passes begin, which is the others' doing, and theirs
    with the ways there and back."""

    others_s: float
    own_s: float

    @property
    def whole_s(self) -> float:
        return self.others_s + self.own_s


IMMEDIATE = ("round-robin", "fewest-requests", "shortest-queue")  # dispatch on arrival
ADMISSIONS = (*IMMEDIATE, "pull", "staggered")
DECODE_ALLOCATIONS = ("round-robin", "fewest-requests", "iqr", "cost")


@dataclass(frozen=True, slots=True)
class DispatchOptions:
    """How requests leave the buffer. The first three of ADMISSIONS dispatch on arrival."""

    admission: str = "staggered"
    window_s: float | None = None  # a fixed interval; None: from pass times; 0: no timer
    window_k: float = 1.0  # the interval is this times (pass + dead time) / instances
    prefill_allocation: str = "water-filling"  # or round-robin
    budget: int = 8192  # prompt tokens that one unit computes in one pass
    max_num_seqs: int = 256  # per unit
    max_parked_share: float = 0.5  # of prefill memory pinned by prefilled requests: pause above it

    @property
    def holds_door(self) -> bool:
        """Whether a prefill worker with prompts left waits at the end of a pass for a Departure."""
        return self.admission not in IMMEDIATE
