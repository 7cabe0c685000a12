"""Do the books balance? The coordinator's accounts against what every worker counts anew.

A worker is asked by a record, `Count`, and rings keep their order. So when its answer is read, all
that it had said before is known here, and it had taken in all that was sent before the question:
what was sent later, the link's `tail`, is left out of the comparison. Nothing has to stand still.

Compared are the records on both rings, the requests that each side knows on that worker and what
they do there (pinned are those parked or moving, and those whose pages are not offered yet), the
blocks of the real pool, and, where nothing moves, the account that decisions are made with. The
coordinator's own books are compared with each other: every open request waits where its phase says
and has a stream; all that were accepted have ended or are open.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nodeserve.coordinator.coordinator import Coordinator
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.request import Request
from nodeserve.coordinator.survey import ANSWER_TIMEOUT_S, Survey, Tell
from nodeserve.policy.lifecycle import Phase
from nodeserve.types import Load
from nodeserve.wire.messages import Count, Counted
from nodeserve.wire.numbers import unpack_request_ids

STAGES = ("waiting", "running", "pulling", "pinned", "preempted")
ANY = frozenset(STAGES)
# What a request may be on the worker that holds it; a preemption is told when its step ends.
HOLDER_STAGES = {
    Phase.PREFILL: frozenset(("waiting", "pinned", "preempted")),
    Phase.MOVING: frozenset(("pulling",)),
    Phase.DECODE: frozenset(("running", "preempted")),
}
NUM_SHOWN = 5  # request ids in a sentence


@dataclass(slots=True)
class Asked:
    """One worker's part: what was counted here when it was asked, and its answer."""

    num_records: int  # sent up to Count
    num_requests: int  # likewise: prompts and pulls
    told: Counted | None = None
    problems: list[str] = field(default_factory=list)


class Auditor:
    """Carries out audits, one at a time; who asks during one gets the next."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._asked: dict[WorkerLink, Asked] = {}
        self._survey = Survey(self._begin, self._result)
        coordinator.on_counted = self._on_counted

    def ask(self, tell: Tell) -> None:
        """`tell` gets the result, see `_result`."""
        self._survey.ask(tell)

    def _begin(self, number: int) -> Iterable[WorkerLink]:
        self._asked = {}
        for link in self._coordinator.links:
            if link.alive and link.leads:  # followers book nothing
                link.send(Count(number))
                link.tail = []
                self._asked[link] = Asked(link.num_sent, link.account.num_sent)
        return list(self._asked)

    def _on_counted(self, link: WorkerLink, told: Counted) -> None:
        if not self._survey.expects(link, told.number):
            return
        asked = self._asked[link]
        asked.told = told
        asked.problems = list(worker_problems(link, asked, told, self._coordinator.requests))
        link.tail = None
        self._survey.answered(link)

    def _result(self) -> dict[str, Any]:
        """`problems`, in words, and the figures; it adds up if there are none."""
        asked = self._asked
        for link in asked:
            link.tail = None
        problems = list(own_problems(self._coordinator))
        for link, one in asked.items():
            if one.told is None and link.alive:
                problems.append(f"{name_of(link)} did not answer in {ANSWER_TIMEOUT_S:g} s")
            problems += one.problems
        phases = Counter(request.phase for request in self._coordinator.requests.values())
        return {
            "problems": problems,
            "requests": {phase.name.lower(): count for phase, count in phases.items()},
            "workers": [figures(link, one.told) for link, one in asked.items() if one.told],
        }


def name_of(link: WorkerLink) -> str:
    return f"worker {link.index} ({link.role.value})"


def figures(link: WorkerLink, told: Counted) -> dict[str, Any]:
    """One worker's row."""
    return {
        "index": link.index,
        "role": link.role.value,
        "num_blocks": told.num_blocks,
        "free_blocks": told.num_free,
        "held_blocks": told.num_held,
        **{stage: len(getattr(told, stage)) // 8 for stage in STAGES},
        "records_to_it": told.num_records_received,
        "records_from_it": told.num_records_sent,
    }


# ---- a worker


def worker_problems(
    link: WorkerLink, asked: Asked, told: Counted, requests: Mapping[int, Request]
) -> Iterator[str]:
    """What differs between here and there, one sentence each."""
    name, tail = name_of(link), frozenset(link.tail or ())
    if told.problem:
        yield f"{name}: its own books: {told.problem}"
    if told.num_free + told.num_held != told.num_blocks:
        yield (
            f"{name}: {told.num_blocks} blocks, but {told.num_free} are free and {told.num_held}"
            " belong to requests"
        )
    for what, sent, received in (
        ("records to it", asked.num_records, told.num_records_received),
        ("records from it", told.num_records_sent, link.num_received),
        ("requests given to it", asked.num_requests, Load._make(told.load).num_received),
    ):
        if sent != received:
            yield f"{name}: {what}: {sent} sent, {received} received"
    yield from request_problems(name, expected_at(link.index, requests.values()), told, tail)
    if not (tail or told.waiting or told.running or told.pulling or told.preempted):
        yield from account_problems(name, link, told)


def expected_at(index: int, requests: Iterable[Request]) -> dict[int, frozenset[str]]:
    """The requests of which that worker must have something, and as what."""
    expected: dict[int, frozenset[str]] = {}
    for request in requests:
        phase = request.phase
        if phase is Phase.DRAINING:
            if index in request.waiting_for or index == request.source:
                expected[request.request_id] = ANY
        elif index == request.source and phase in (Phase.PARKED, Phase.MOVING):
            expected[request.request_id] = frozenset(("pinned",))
        elif index == request.holder and phase in HOLDER_STAGES:
            expected[request.request_id] = HOLDER_STAGES[phase]
    return expected


def request_problems(
    name: str, expected: Mapping[int, frozenset[str]], told: Counted, tail: frozenset[int]
) -> Iterator[str]:
    there = {
        request_id: stage
        for stage in STAGES
        for request_id in unpack_request_ids(getattr(told, stage))
    }
    missing = expected.keys() - there.keys() - tail
    if missing:
        yield f"{name}: has nothing of {shown(missing)}, which should be there"
    surplus = there.keys() - expected.keys() - tail
    if surplus:
        yield f"{name}: still has {shown(surplus)}, which should not be there"
    for request_id in sorted((there.keys() & expected.keys()) - tail):
        if there[request_id] not in expected[request_id]:
            wanted = " or ".join(sorted(expected[request_id]))
            yield f"{name}: request {request_id} is {there[request_id]}, not {wanted}"


def account_problems(name: str, link: WorkerLink, told: Counted) -> Iterator[str]:
    """No request moves there, so what is believed here is what is there."""
    account, num_pinned = link.account, len(told.pinned) // 8
    num_tokens = Load._make(told.load).waiting_tokens  # of a running step, its requests being gone
    for what, believed, there in (
        ("free blocks", account.free_blocks, told.num_free),
        ("requests", account.num_sequences, num_pinned),
        ("prompt tokens to compute", account.outstanding_tokens, num_tokens),
    ):
        if believed != there:
            yield f"{name}: {what}: {believed} believed, {there} there"


# ---- the coordinator itself


def own_problems(coordinator: Coordinator) -> Iterator[str]:
    """Requests in one book and not in another."""
    requests, dispatch = coordinator.requests, coordinator.dispatch
    phases = Counter(request.phase for request in requests.values())
    num_open = len(requests) - phases[Phase.DRAINING]
    totals = coordinator.totals
    for what, count, expected in (
        ("requests in the buffer", dispatch.num_queued, phases[Phase.WAITING]),
        ("parked requests", len(dispatch.parked), phases[Phase.PARKED]),
        (
            "requests that were accepted",
            coordinator.num_accepted,
            totals.finished + totals.failed + totals.cancelled + num_open,
        ),
        (
            "open requests of connections",
            sum(len(stream.requests) for stream in coordinator.streams),
            num_open,
        ),
    ):
        if count != expected:
            yield f"coordinator: {what}: {count}, but {expected} by their phases"


def shown(request_ids: Iterable[int]) -> str:
    """Request ids for a sentence, as the coordinator numbers them."""
    first, *rest = sorted(request_ids)
    if not rest:
        return f"request {first}"
    more = len(rest) + 1 - NUM_SHOWN
    words = ", ".join(map(str, [first, *rest][:NUM_SHOWN]))
    return f"requests {words}" + (f" and {more} more" if more > 0 else "")
