"""In one line: what limits goodput now.

What to blame for most misses of the last seconds says which part of the way is too slow; the state
of the workers there says why, and on which.
"""

from collections.abc import Callable, Iterable

from nodeserve.blame import (
    BUFFER,
    CLIENT,
    DECODE,
    DEVICE_WAIT,
    FAILED,
    HANDOFF,
    HANDOFF_WAIT,
    PREEMPTION,
    PREFILL,
    REFUSED,
    RETURN,
)
from nodeserve.views.frame import Frame, Span, Worker

GOAL = 0.9  # attainment from which nothing limits
FULL = 0.9  # share of a worker's blocks
FULL_FOR_MORE = 0.7  # from which, where requests wait for room, it is this that they wait for
BUSY = 0.8  # share of a worker's time
IDLE = 0.5  # of one that has work all the time: something else keeps it from computing
FEW = 10  # requests that a short span must have; with fewer, a longer one counts


def verdict_of(frame: Frame) -> str:
    """See the module's head."""
    if frame.state in ("not ready", "stopping"):
        return f"{frame.state}: {frame.reasons[0]}" if frame.reasons else frame.state
    span = telling(frame.spans)
    if span is None or span.attainment is None:
        return without_judgement(frame)
    within = f"in {words_of(span.seconds)}"
    if not span.missed:
        return f"all {span.offered} requests met their SLO {within}"
    word, count = next(iter(span.missed.items()))
    share = count / (span.offered - span.good)
    why = WHY[word](frame) if word in WHY else word
    if span.attainment >= GOAL:
        return f"{span.attainment:.0%} met their SLO {within}; of the others {share:.0%}: {why}"
    return f"{why}: {share:.0%} of misses {within}"


def telling(spans: Iterable[Span]) -> Span | None:
    """The shortest span with enough requests, else the longest that has some."""
    some = [span for span in spans if span.offered]
    return next((span for span in some if span.offered >= FEW), some[-1] if some else None)


def words_of(seconds: int) -> str:
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min"


def without_judgement(frame: Frame) -> str:
    longest = frame.spans[-1]
    if not longest.ended_per_s and not sum(frame.requests[name] for name in ("queued", "running")):
        return "idle"
    if not frame.slo:
        return "no request had an SLO: give one with start --slo, or with the requests"
    return f"no request with an SLO has ended in {words_of(longest.seconds)}"


# ---- why, by what is to blame


def full_decode(frame: Frame) -> str | None:
    """The fullest of those that decode, if it is full."""
    worker = most(decoders(frame), lambda one: one.kv_use)
    least = FULL_FOR_MORE if frame.admission.parked else FULL
    if worker is None or worker.kv_use < least:
        return None
    return f"decode KV full on w{worker.index}"


def for_decode(frame: Frame) -> str:
    worker = most(decoders(frame), lambda one: one.step_ms)
    if worker is None:
        return "nobody decodes"
    if worker.busy is not None and worker.busy < IDLE:
        lag = f"the server's loop is late by {frame.loop_lag_ms:.0f} ms"
        return f"decode steps far apart, w{worker.index} is {worker.busy:.0%} busy, {lag}"
    return f"decode steps of {worker.step_ms:.0f} ms on w{worker.index} ({worker.running} running)"


def for_handoff_wait(frame: Frame) -> str:
    return full_decode(frame) or f"no decode worker takes more ({frame.admission.parked} parked)"


def for_handoff(frame: Frame) -> str:
    speed = frame.handoff.gb_per_s
    return "slow handoffs" + ("" if speed is None else f" ({speed:.1f} GB/s)")


def for_buffer(frame: Frame) -> str:
    """Prefill that has time left waits for something: for decode, if pages are parked."""
    admission, load = frame.admission, mean_busy(prefillers(frame))
    wait = f"{admission.queued} wait in the buffer"
    if admission.parked and (load is None or load < BUSY):
        return f"{for_handoff_wait(frame)}, {wait}"
    if load is None or load >= BUSY:
        return f"prefill too slow, {wait}{busy_words(prefillers(frame))}"
    return f"{wait}, prefill {load:.0%} busy"


def for_device_wait(frame: Frame) -> str:
    worker = most(prefillers(frame), lambda one: one.waiting_tokens)
    if worker is None:
        return "nobody prefills"
    return f"prompts queue on w{worker.index} ({worker.waiting_tokens} tokens)"


def for_prefill(frame: Frame) -> str:
    pass_ms = frame.admission.pass_ms
    return "prefill passes too long" + ("" if pass_ms is None else f" ({pass_ms:.0f} ms)")


def for_preemption(frame: Frame) -> str:
    lost = [one for one in frame.workers if one.state != "ready"]
    if lost:
        return f"w{lost[0].index} is {lost[0].state}"
    worker = most(decoders(frame), lambda one: one.kv_use)
    return f"preemptions, KV {worker.kv_use:.0%} used on w{worker.index}" if worker else "losses"


def for_refused(frame: Frame) -> str:
    if frame.admission.parked and not busy_words(prefillers(frame)):
        return f"{for_handoff_wait(frame)}, more is refused"
    load = busy_words(prefillers(frame)) or busy_words(decoders(frame))
    return f"more is asked than can be in time, refused{load}"


def busy_words(workers: Iterable[Worker]) -> str:
    """Nothing, unless they have little time left."""
    mean = mean_busy(workers)
    return "" if mean is None or mean < BUSY else f", workers {mean:.0%} busy"


def mean_busy(workers: Iterable[Worker]) -> float | None:
    """None where it is not known yet."""
    shares = [one.busy for one in workers if one.busy is not None]
    return sum(shares) / len(shares) if shares else None


def decoders(frame: Frame) -> list[Worker]:
    return [one for one in serving(frame) if one.acting != "prefill"]


def prefillers(frame: Frame) -> list[Worker]:
    return [one for one in serving(frame) if one.acting != "decode"]


def serving(frame: Frame) -> list[Worker]:
    """Whose numbers tell of an instance: one that follows would seem to be idle."""
    return [one for one in frame.workers if one.state == "ready" and one.leads]


def most(workers: list[Worker], key: Callable[[Worker], float]) -> Worker | None:
    return max(workers, key=key, default=None)


WHY: dict[str, Callable[[Frame], str]] = {
    BUFFER: for_buffer,
    DEVICE_WAIT: for_device_wait,
    PREFILL: for_prefill,
    RETURN: lambda frame: f"the server's loop is late (by {frame.loop_lag_ms:.0f} ms)",
    HANDOFF_WAIT: for_handoff_wait,
    HANDOFF: for_handoff,
    DECODE: for_decode,
    PREEMPTION: for_preemption,
    CLIENT: lambda frame: "clients that do not read",
    REFUSED: for_refused,
    FAILED: lambda frame: "requests that failed, see the log",
}
