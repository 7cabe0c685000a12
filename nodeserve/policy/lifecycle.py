"""A request's life as a table.

Always true: a request is in exactly one phase, `advance` is the only way to another, and an event
that is not in the table is our bug. Messages that crossed on the wire (a KvReady that arrives after
a cancel) have a row here instead of an `if` somewhere. DONE has no way out, so a request can end
only once.

                 ADMITTED            KV_READY           PULLING            KV_PULLED
    WAITING ----------------> PREFILL --------> PARKED ---------> MOVING ------------> DECODE
       ^                        |                  ^                 |                   |
       |        PREEMPTED       |                  |   KV_REFUSED    |                   |
       +------------------------+------------------+-----------------+ <----PREEMPTED----+

WAITING: in the coordinator's buffer. PREFILL: a prefill worker (or mixed one) has it. PARKED: its
pages wait in prefill memory for room on the decode side. MOVING: a decode worker copies them.
DECODE: one token a step. DRAINING: ended for the client, a worker still holds or reads pages.

A lost worker puts what it held back to WAITING, with the tokens that the client has already seen
appended to the prompt. A lost puller is a refusal: the source still has the pages. If those that
pull are all gone, what is PARKED goes back to WAITING as well.
"""

import enum

from nodeserve.errors import LifecycleError


class Phase(enum.Enum):
    WAITING = enum.auto()
    PREFILL = enum.auto()
    PARKED = enum.auto()
    MOVING = enum.auto()
    DECODE = enum.auto()
    DRAINING = enum.auto()
    DONE = enum.auto()


class Event(enum.Enum):
    ADMITTED = enum.auto()
    PREFILLED = enum.auto()  # first token, decodes on the same worker
    KV_READY = enum.auto()  # first token, pages pinned for a handoff
    PULLING = enum.auto()
    KV_PULLED = enum.auto()
    KV_REFUSED = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()  # stop token or length, said by the worker that freed it
    CANCELLED = enum.auto()  # by the client, or its connection ended
    FAILED = enum.auto()  # this request alone, said by a worker that freed it
    WORKER_LOST = enum.auto()
    RELEASED = enum.auto()  # the last worker that held something let go


TRANSITIONS: dict[Phase, dict[Event, Phase]] = {
    Phase.WAITING: {
        Event.ADMITTED: Phase.PREFILL,
        Event.CANCELLED: Phase.DONE,
    },
    Phase.PREFILL: {
        Event.PREFILLED: Phase.DECODE,
        Event.KV_READY: Phase.PARKED,
        Event.FINISHED: Phase.DONE,
        Event.PREEMPTED: Phase.WAITING,
        Event.CANCELLED: Phase.DRAINING,
        Event.FAILED: Phase.DONE,
        Event.WORKER_LOST: Phase.WAITING,
    },
    Phase.PARKED: {
        Event.PULLING: Phase.MOVING,
        Event.CANCELLED: Phase.DRAINING,
        Event.WORKER_LOST: Phase.WAITING,
    },
    Phase.MOVING: {
        Event.KV_PULLED: Phase.DECODE,
        Event.KV_REFUSED: Phase.PARKED,
        Event.CANCELLED: Phase.DRAINING,
        Event.FAILED: Phase.DRAINING,  # the source still has to release its pages
    },
    Phase.DECODE: {
        Event.FINISHED: Phase.DONE,
        Event.PREEMPTED: Phase.WAITING,
        Event.CANCELLED: Phase.DRAINING,
        Event.FAILED: Phase.DONE,
        Event.WORKER_LOST: Phase.WAITING,
    },
    Phase.DRAINING: {
        Event.PREFILLED: Phase.DRAINING,  # these crossed with our cancel
        Event.KV_READY: Phase.DRAINING,
        Event.KV_PULLED: Phase.DRAINING,
        Event.KV_REFUSED: Phase.DRAINING,
        Event.PREEMPTED: Phase.DRAINING,
        Event.FINISHED: Phase.DRAINING,
        Event.FAILED: Phase.DRAINING,
        Event.RELEASED: Phase.DONE,
    },
    Phase.DONE: {},
}


def advance(phase: Phase, event: Event) -> Phase:
    """The next phase; LifecycleError when the event is not legal in this one."""
    try:
        return TRANSITIONS[phase][event]
    except KeyError:
        raise LifecycleError(f"{event.name} is not legal in {phase.name}") from None
