"""Which part of the way made a request miss its limits.

A server that says where a request's time went (`types.Timings`) makes it possible: the stage that
took the most more than it does for good requests. What the server does not see is the way between
it and the client.
"""

import statistics
from collections import Counter
from collections.abc import Sequence

from nodeserve.loadgen.records import Sample
from nodeserve.plan.goodput import Slo
from nodeserve.plan.summary import STAGES

OUTSIDE = "outside"  # between client and server
UNKNOWN = "unknown"  # the server says no times
HANDOFF = ("handoff_wait_s", "handoff_s")
DECODE = "decode"  # less the handoff


def blame(samples: Sequence[Sample], slos: Sequence[Slo]) -> dict[str, int]:
    """Stages by how many misses they explain, most first. A request that failed has its error's
    code instead of a stage."""
    usual = typical(
        [
            one
            for one, slo in zip(samples, slos, strict=True)
            if one.error is None and slo.met(one.ttft_s, one.tpot_s, one.e2e_s)
        ]
    )
    found: Counter[str] = Counter()
    for sample, slo in zip(samples, slos, strict=True):
        if sample.error is not None:
            found[sample.error] += 1
        elif missed := slo.missed(sample.ttft_s, sample.tpot_s, sample.e2e_s):
            found[_worst(sample, missed, usual)] += 1
    return dict(found.most_common())


def typical(good: Sequence[Sample]) -> dict[str, float]:
    """The median seconds of each stage; of decoding, for each token after the first."""
    known = [stages(one) for one in good if one.timings is not None]
    if not known:
        return {}
    usual = {name: statistics.median(one[name] for one in known) for name in known[0]}
    decodes = [
        stages(one)[DECODE] / (one.num_output_tokens - 1)
        for one in good
        if one.timings is not None and one.num_output_tokens > 1
    ]
    return {**usual, DECODE: statistics.median(decodes) if decodes else 0.0}


def stages(sample: Sample) -> dict[str, float]:
    """Where the time of a request went, by name, in seconds; it has `timings`."""
    timings = sample.timings
    assert timings is not None
    before = {_words(name): float(getattr(timings, name)) for name in STAGES}
    after = {_words(name): float(getattr(timings, name)) for name in HANDOFF}
    outside_s = max(0.0, (sample.ttft_s or 0.0) - timings.ttft_s)
    decode_s = max(0.0, timings.decode_s - sum(after.values()))
    return {**before, OUTSIDE: outside_s, **after, DECODE: decode_s}


def _worst(sample: Sample, missed: Sequence[str], usual: dict[str, float]) -> str:
    """The stage that took the most more than usual, of those that count for what was missed."""
    if sample.timings is None:
        return UNKNOWN
    spent = stages(sample)
    after = {*map(_words, HANDOFF), DECODE}
    if "e2e" not in missed and "tpot" not in missed:
        spent = {name: seconds for name, seconds in spent.items() if name not in after}
    elif "e2e" not in missed and "ttft" not in missed:
        spent = {name: seconds for name, seconds in spent.items() if name in after}
    expected = {**usual, DECODE: usual.get(DECODE, 0.0) * (sample.num_output_tokens - 1)}
    return max(spent, key=lambda name: spent[name] - expected.get(name, 0.0))


def _words(field: str) -> str:
    return field.removesuffix("_s").replace("_", " ")
