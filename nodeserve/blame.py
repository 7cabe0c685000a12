"""Which part of its way made a request miss its SLO: for the live node and for a benchmark alike.

The stage to blame is the one that took the most more than it does for good requests, of those that
count for what was missed: what comes before the first token for the TTFT, what comes after it for
the TPOT. A stage's words are those of `stages_of`; who sees more than the server's times adds to
them.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from nodeserve.types import Slo, Timings

BUFFER = "buffer"  # it waits for prefill
DEVICE_WAIT = "device wait"  # sent, and the worker computes others
PREFILL = "prefill"
RETURN = "return"  # the pass is over, the coordinator has not read of it
HANDOFF_WAIT = "handoff wait"  # no decode worker has room
HANDOFF = "handoff"  # its pages are on their way
DECODE = "decode"
PREEMPTION = "preemption"  # it lost its place, to another or with a worker
CLIENT = "client"  # its client does not read
REFUSED = "refused"  # it could not be met, or there was no room to wait
FAILED = "failed"
WORDS = (
    *(BUFFER, DEVICE_WAIT, PREFILL, RETURN, HANDOFF_WAIT, HANDOFF, DECODE, PREEMPTION),
    *(CLIENT, REFUSED, FAILED),
)
_AFTER = frozenset((HANDOFF_WAIT, HANDOFF, DECODE, PREEMPTION))


class Spent(NamedTuple):
    """Seconds by stage; `before` add up to the time to the first token, `after` to the last."""

    before: dict[str, float]
    after: dict[str, float]


def stages_of(timings: Timings) -> Spent:
    """Where the time of a request went, as far as the server knows."""
    before = {
        BUFFER: timings.scheduler_wait_s - timings.lost_before_s,
        DEVICE_WAIT: timings.transit_s + timings.device_wait_s,
        PREFILL: timings.prefill_s,
        RETURN: timings.return_s,
        PREEMPTION: timings.lost_before_s,
    }
    after = {
        HANDOFF_WAIT: timings.handoff_wait_s,
        HANDOFF: timings.handoff_s,
        PREEMPTION: timings.lost_after_s,
    }
    after[DECODE] = max(0.0, timings.decode_s - sum(after.values()))
    return Spent(before, after)


def expected(usual: Mapping[str, float], slo: Slo, num_gaps: int) -> dict[str, float]:
    """What is usual for an answer with so many tokens after its first, as far as its limits leave
    room for that; `usual` has decoding for each of them. While no request was good, decoding may
    take all of its limit."""
    whole = {**usual, DECODE: usual.get(DECODE, slo.tpot_s or 0.0) * num_gaps}
    after = {name: seconds for name, seconds in whole.items() if name in _AFTER}
    before = {name: seconds for name, seconds in whole.items() if name not in _AFTER}
    all_gaps_s = None if slo.tpot_s is None else slo.tpot_s * num_gaps
    return {**_within(before, slo.ttft_s), **_within(after, all_gaps_s)}


def _within(usual: dict[str, float], limit_s: float | None) -> dict[str, float]:
    """In proportion, if all together are longer than that."""
    sum_s = sum(usual.values())
    if limit_s is None or sum_s <= limit_s:
        return usual
    return {name: seconds * limit_s / sum_s for name, seconds in usual.items()}


def culprit(spent: Spent, missed: Collection[str], expected: Mapping[str, float]) -> str:
    """The stage that took the most more than expected; `missed` are names of limits (Slo.missed).
    Who misses several is late by the sum of all stages."""
    if "e2e" not in missed and "tpot" not in missed:
        counted = spent.before
    elif "e2e" not in missed and "ttft" not in missed:
        counted = spent.after
    else:
        counted = {
            name: spent.before.get(name, 0.0) + spent.after.get(name, 0.0)
            for name in (*spent.before, *spent.after)
        }
    return max(counted, key=lambda name: counted[name] - expected.get(name, 0.0))
