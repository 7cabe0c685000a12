"""An audit's messages: what is asked of each worker, and what comes of it for who asked."""

from typing import Any, NamedTuple

# ---- coordinator -> worker


class Count(NamedTuple):
    """For an audit: count everything. Answer: Counted, with the same number."""

    number: int


# ---- worker -> coordinator


class Counted(NamedTuple):
    """What there really is, not what was kept count of: the pool, and each request that is here.

    Records are those up to Count and this one, since the process began. `num_held` blocks belong to
    a request, or to a running step that may still write to them. Request ids are of the sequences
    that wait, run, are being pulled, and are pinned; `preempted` ones are gone, and the StepDone
    that tells it is to come. `problem` is empty unless the worker finds a fault in its own books.
    """

    number: int
    num_records_received: int
    num_records_sent: int
    num_blocks: int
    num_free: int
    num_held: int
    waiting: bytes
    running: bytes
    pulling: bytes
    pinned: bytes
    preempted: bytes
    load: list[int]
    problem: str


# ---- client -> coordinator


class GetAudit(NamedTuple):
    """Ask for an Audit."""


# ---- coordinator -> client


class Audit(NamedTuple):
    """Answer to GetAudit: do blocks, requests and records add up?"""

    audit: dict[str, Any]
