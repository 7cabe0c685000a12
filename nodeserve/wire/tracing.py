"""What a server tells those who trace it: which request is where, and what each worker runs.

`Trace` and `Traced` are messages like any other (messages.py); the events inside travel as lists
of their tag and fields. All times are seconds of the machine's monotonic clock, which workers,
server and clients on one machine share. Requests have the server's numbers; nothing here has text
or token ids.
"""

from typing import Any, NamedTuple

from nodeserve.wire import limits
from nodeserve.wire.tagged import Tagged

# What a request is in between two events about it, in the order of an undisturbed life. The first
# five are the stages of types.Timings.
BUFFER, TRANSIT, DEVICE_WAIT, PREFILL, RETURN = (
    *("buffer", "transit", "device wait"),
    *("prefill", "return"),
)
HANDOFF_WAIT, HANDOFF, DECODE = "handoff wait", "handoff", "decode"
STAGES = (BUFFER, TRANSIT, DEVICE_WAIT, PREFILL, RETURN, HANDOFF_WAIT, HANDOFF, DECODE)


class Trace(NamedTuple):
    """Begin (`on`) or end to be told what happens, in Traced frames on this connection."""

    on: bool


class Traced(NamedTuple):
    """Events since the last one, in the order in which the server learned of them.

    `lost` counts those that this client did not get since it began, because it read too slowly.
    With `over` it is the last one, the answer to `Trace(False)`.
    """

    events: list[Any]
    lost: int
    over: bool


# ---- events


class Began(NamedTuple):
    """The first event. `workers` has [index, instance, rank, role, gpu or None] of each."""

    at_s: float
    workers: list[Any]


class Arrived(NamedTuple):
    """A request was accepted; it is in the buffer."""

    at_s: float
    request: int
    prompt_tokens: int
    max_tokens: int
    priority: int


class Entered(NamedTuple):
    """A request came into a stage, and left the one before. `worker` -1: it is with none."""

    at_s: float
    request: int
    stage: str
    worker: int


class Pulled(NamedTuple):
    """A request's pages are on `worker`: so many bytes, copied in `seconds` that ended before."""

    at_s: float
    request: int
    worker: int
    source: int
    num_bytes: int
    seconds: float


class SetBack(NamedTuple):
    """A request lost its place and waits in the buffer again; `why` is for people."""

    at_s: float
    request: int
    why: str


class Ended(NamedTuple):
    """A request's end for its client: `reason`, `code` and `timings` as in its End.

    `at_s` is the time of its last token if it ended by itself.
    """

    at_s: float
    request: int
    reason: str
    code: str | None
    prompt_tokens: int
    output_tokens: int
    timings: dict[str, Any]


class Refused(NamedTuple):
    """A request that was never accepted, and why."""

    at_s: float
    code: str


class Departed(NamedTuple):
    """A batch left the buffer for an instance."""

    at_s: float
    instance: int
    requests: int
    tokens: int


class Ran(NamedTuple):
    """One pass of a worker, by its own account of the times. `started` are the requests whose
    prefill began in it (int64); `waiting`, `running` and the others are what it held afterwards."""

    worker: int
    step: int
    began_s: float
    seconds: float
    prefill_tokens: int
    decodes: int
    kv_tokens: int
    started: bytes
    running: int
    waiting: int
    pinned: int
    free_blocks: int


class Worker(NamedTuple):
    """A worker's state changed: lost, with the reason, or ready again."""

    at_s: float
    worker: int
    state: str
    why: str


Event = Began | Arrived | Entered | Pulled | SetBack | Ended | Refused | Departed | Ran | Worker
EVENTS: Tagged[Event] = Tagged(Event, limits.OF_THE_SERVER)
