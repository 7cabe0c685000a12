"""Every message that crosses a process, sorted by receiver.

Bulk integers travel as `bytes`: int32 little-endian for token and block ids, int64 for request
ids (`pack_ids`, `pack_request_ids`). Request ids are the coordinator's own on the rings and the
client's own on its socket. Sampling travels as the mapping of `types.sampling_to`.

Rings (coordinator <-> worker) need no version, both ends are one commit. The socket opens with a
`Hello` that carries one; docs/protocol.md describes that side for other languages.
"""

from typing import Any, NamedTuple

from nodeserve.wire import limits
from nodeserve.wire.audit import Audit as Audit
from nodeserve.wire.audit import Count as Count
from nodeserve.wire.audit import Counted as Counted
from nodeserve.wire.audit import GetAudit as GetAudit
from nodeserve.wire.experts import CountExperts as CountExperts
from nodeserve.wire.experts import Experts as Experts
from nodeserve.wire.experts import ExpertsCounted as ExpertsCounted
from nodeserve.wire.experts import GetExperts as GetExperts
from nodeserve.wire.numbers import pack_counts as pack_counts
from nodeserve.wire.numbers import pack_floats as pack_floats
from nodeserve.wire.numbers import pack_ids as pack_ids
from nodeserve.wire.numbers import pack_request_ids as pack_request_ids
from nodeserve.wire.numbers import pack_times as pack_times
from nodeserve.wire.numbers import unpack_counts as unpack_counts
from nodeserve.wire.numbers import unpack_floats as unpack_floats
from nodeserve.wire.numbers import unpack_ids as unpack_ids
from nodeserve.wire.numbers import unpack_request_ids as unpack_request_ids
from nodeserve.wire.numbers import unpack_times as unpack_times
from nodeserve.wire.tagged import Tagged
from nodeserve.wire.tracing import Trace as Trace
from nodeserve.wire.tracing import Traced as Traced

PROTOCOL_VERSION = 2

# ---- coordinator -> worker


class AttachPages(NamedTuple):
    """Map a peer's page pool. Answer: PagesAttached.

    It is device memory behind a CUDA IPC `handle`, or shared memory behind an inherited descriptor.
    """

    worker: int
    fd: int
    num_bytes: int
    handle: bytes
    leader: int  # of its team: PullKv's source
    place: list[int]  # its part of every block: tp_rank, tp, pp_rank, pp


class Prompt(NamedTuple):
    """One request of a Prefill: compute its KV and its next token.

    `token_ids` are the prompt and, after a preemption, the tokens emitted so far. With `handoff`
    the blocks stay pinned after the first token until ReleaseKv; without, the worker decodes on.
    """

    request_id: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: dict[str, Any]
    handoff: bool


class Prefill(NamedTuple):
    """A worker's share of a departure: `prompts` are lists of the fields of Prompt, in order.

    Departures that ranks wait for are numbered, rising; every rank of the instance gets each, be it
    empty. 0: nobody waits for this one, or more of it follows.
    """

    departure: int
    prompts: list[Any]


class PullKv(NamedTuple):
    """Copy a request's pages from a peer's pool, then decode. Answer: KvPulled or KvRefused.

    `token_ids` includes the first token, whose KV does not exist yet: the pages hold one fewer.
    """

    request_id: int
    source: int
    block_ids: bytes
    token_ids: bytes
    num_prompt_tokens: int
    sampling: dict[str, Any]


class ReleaseKv(NamedTuple):
    """The pinned blocks of a handed-over request are no longer needed. Answer: one Dropped.

    The answer carries the load: without it an idle prefill worker would look full for ever.
    """

    request_id: int


class Cancel(NamedTuple):
    """Forget a request in whatever state it is, free its blocks. Answer: always one Dropped."""

    request_id: int


class Shutdown(NamedTuple):
    """Leave the step loop and exit with code 0."""


class Probe(NamedTuple):
    """Nothing was heard for longer than expected: say what you hold. Answer: Alive."""


class DetachPages(NamedTuple):
    """The peer `worker` has ended: unmap its pages. No answer but a RequestFailed with
    `handoff_failed` for each pull from there that was not over. A later AttachPages is about its
    next life."""

    worker: int


ToWorker = (
    AttachPages
    | Prefill
    | PullKv
    | ReleaseKv
    | Cancel
    | Shutdown
    | Probe
    | DetachPages
    | Count
    | CountExperts
)
TO_WORKER: Tagged[ToWorker] = Tagged(ToWorker, limits.OF_A_RING)

# ---- worker -> coordinator


class Mapped(NamedTuple):
    """First record: the rings and the semaphore are mapped, their names may go."""

    pid: int


class Loading(NamedTuple):
    """Start-up progress for people: `done` of `total` in `phase`."""

    phase: str
    done: int
    total: int


class Ready(NamedTuple):
    """The model is loaded and warm, the page pool exists."""

    num_blocks: int
    block_bytes: int
    num_threads: int
    pages_bytes: int  # what a peer maps to pull from here
    pages_handle: bytes  # for AttachPages
    kernels: str  # which attention and matrix kernels run, for the start log and `status`
    handoff: str  # how pages leave this worker, likewise
    load_s: float


class PagesAttached(NamedTuple):
    """The pool of `worker` is mapped."""

    worker: int


class StepDone(NamedTuple):
    """One step: every token it sampled, every request it finished, handed over or put back.

    `finish` has one byte per token: 0 goes on, 1 stop token, 2 length. `logprobs` is None or a
    list of [place in the step, logprob, top ids (int32), top logprobs (float32)]. `kv_ready` is a
    list of [request_id, block_ids]. A finished, preempted or failed request holds nothing here any
    more. `started` are requests whose first prefill chunk ran in this step, `received` the times at
    which the worker got them (`pack_times`). Times are seconds of the machine's monotonic clock,
    which all processes of the node share. The four fields from `num_prefill_tokens` on are what
    policy.cost.RankWork says of the step, with the work for requests that are gone by now.
    """

    request_ids: bytes
    token_ids: bytes
    finish: bytes
    logprobs: list[Any] | None
    kv_ready: list[Any]
    started: bytes
    preempted: bytes
    load: list[int]
    step: int  # its number on this worker; the ranks of one instance count together
    began_s: float
    step_s: float
    num_prefill_tokens: int
    attention: float
    num_decodes: int
    kv_tokens: int
    received: bytes


class KvReady(NamedTuple):
    """The pages of a request whose first token a StepDone brought can be pulled now.

    Sent where that takes longer than the step: pages that peers cannot read are first copied to
    memory that they can. Else the StepDone itself says so, in `kv_ready`.
    """

    request_id: int
    block_ids: bytes


class KvPulled(NamedTuple):
    """Pages are here; the request joins the next step. The source may be released."""

    request_id: int
    num_bytes: int
    seconds: float


class KvRefused(NamedTuple):
    """No room for the pages now: nothing was taken, ask again when blocks are free."""

    request_id: int
    load: list[int]


class Dropped(NamedTuple):
    """Answer to Cancel and ReleaseKv: nothing of the request is held or read here any more."""

    request_id: int
    load: list[int]


class RequestFailed(NamedTuple):
    """This request cannot go on here; the worker holds nothing of it any more."""

    request_id: int
    code: str
    message: str
    load: list[int]


class Failed(NamedTuple):
    """The worker as a whole cannot go on; it exits after this."""

    code: str
    message: str


class Alive(NamedTuple):
    """Answer to Probe."""

    load: list[int]


FromWorker = (
    Mapped
    | Loading
    | Ready
    | PagesAttached
    | StepDone
    | KvReady
    | KvPulled
    | KvRefused
    | Dropped
    | RequestFailed
    | Failed
    | Alive
    | Counted
    | ExpertsCounted
)
FROM_WORKER: Tagged[FromWorker] = Tagged(FromWorker, limits.OF_A_RING)

FINISH_REASONS = (None, "stop", "length")

# ---- client -> coordinator


class Submit(NamedTuple):
    """A request; `request_id` is the client's choice, unique among its running ones. `slo` is None
    or {"ttft_ms": number, "tpot_ms": number}, either may be missing. A higher `priority` is served
    earlier."""

    request_id: int
    token_ids: bytes
    sampling: dict[str, Any]
    slo: dict[str, Any] | None
    priority: int


class Abort(NamedTuple):
    """Cancel one of this connection's requests; it still ends with one End."""

    request_id: int


class GetStats(NamedTuple):
    """Ask for Stats."""


class Stop(NamedTuple):
    """Stop the server; with `drain` running requests finish first."""

    drain: bool


class GetHealth(NamedTuple):
    """Ask for Health."""


ToServer = Submit | Abort | GetStats | Stop | GetHealth | GetAudit | Trace | GetExperts
TO_SERVER: Tagged[ToServer] = Tagged(ToServer, limits.OF_A_CLIENT)

# ---- coordinator -> client


class Hello(NamedTuple):
    """First frame on a connection."""

    version: int
    server: dict[str, Any]  # model, tokenizer, max_model_len, eos_token_ids, limits, pid


class Tokens(NamedTuple):
    """New tokens, one frame for everything a connection gets at once.

    `items` is a list of [request_id, token_ids, logprobs]; `logprobs` is None or one
    [logprob, top ids (int32), top logprobs (float32)] per token.
    """

    items: list[Any]


class End(NamedTuple):
    """The one terminal event of a request.

    With `reason` "stop" or "length", `code` is None; else `reason` is "error" or "cancelled"
    and `code`, `message` name a class of errors.py. `usage` has prompt_tokens and
    completion_tokens; `timings` the fields of types.Timings. `retry_after_s` may come with
    "overloaded" and "shutting_down": when it may be worth another try.
    """

    request_id: int
    reason: str
    code: str | None
    message: str
    usage: dict[str, int]
    timings: dict[str, Any]
    retry_after_s: float | None


class Stats(NamedTuple):
    """Answer to GetStats."""

    stats: dict[str, Any]


class Goodbye(NamedTuple):
    """The server closes this connection, and no frame follows.

    Its client broke the protocol, or the server stops: asked to (`shutting_down`), or because of
    the error that `code` names.
    """

    code: str
    message: str


class Health(NamedTuple):
    """Answer to GetHealth."""

    health: dict[str, Any]


ToClient = Hello | Tokens | End | Stats | Goodbye | Health | Audit | Traced | Experts
TO_CLIENT: Tagged[ToClient] = Tagged(ToClient, limits.OF_THE_SERVER)
