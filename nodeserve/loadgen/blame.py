"""What made the requests of a run miss their limits, as nodeserve/blame.py has it.

A server that says where a request's time went (`types.Timings`) makes it possible. What the server
does not see is the way between it and the client.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from nodeserve.blame import DECODE, Spent, culprit, expected, stages_of
from nodeserve.loadgen.records import Sample
from nodeserve.plan.goodput import Slo

OUTSIDE = "outside"  # between client and server, or sent late
UNKNOWN = "unknown"  # the server says no times
FAILED = "failed"
SHORT = "short"  # fewer tokens than were forced: one alone has no time from token to token


def missed_by(sample: Sample, slo: Slo, forced: bool = True) -> tuple[str, ...]:
    """The limits that a request missed, or why it could not meet any; nothing for a good one.
    `forced`: it had to have all the tokens that were asked for."""
    if sample.error is not None:
        return (FAILED,)
    if forced and sample.is_short:
        return (SHORT,)
    return slo.missed(*sample.judged_s)


def blame(samples: Sequence[Sample], slos: Sequence[Slo], forced: bool = True) -> dict[str, int]:
    """Stages by how many misses they explain, most first."""
    found = Counter(one for one in culprits(samples, slos, forced) if one)
    return dict(found.most_common())


def culprits(samples: Sequence[Sample], slos: Sequence[Slo], forced: bool = True) -> list[str]:
    """What each miss is blamed on, "" for a good request: a stage; for a request that failed its
    error's code, for one that ended too soon "short"."""
    misses = [missed_by(one, slo, forced) for one, slo in zip(samples, slos, strict=True)]
    usual = typical([one for one, missed in zip(samples, misses, strict=True) if not missed])
    return [
        _culprit(sample, slo, missed, usual)
        for sample, slo, missed in zip(samples, slos, misses, strict=True)
    ]


def _culprit(sample: Sample, slo: Slo, missed: Sequence[str], usual: Mapping[str, float]) -> str:
    if not missed:
        return ""
    if sample.error is not None:
        return sample.error
    if SHORT in missed:
        return SHORT
    spent = stages(sample)
    usually = expected(usual, slo, sample.num_output_tokens - 1)
    return UNKNOWN if spent is None else culprit(spent, missed, usually)


def typical(good: Sequence[Sample]) -> dict[str, float]:
    """The median seconds of each stage; of decoding, for each token after the first."""
    known = [(one, spent) for one in good if (spent := stages(one)) is not None]
    if not known:
        return {}
    flat = [{**spent.before, **spent.after} for _, spent in known]
    usual = {name: statistics.median(one[name] for one in flat) for name in flat[0]}
    decodes = [
        spent.after[DECODE] / (one.num_output_tokens - 1)
        for one, spent in known
        if one.num_output_tokens > 1
    ]
    del usual[DECODE]
    return {**usual, DECODE: statistics.median(decodes)} if decodes else usual


def stages(sample: Sample) -> Spent | None:
    """Where the time of a request went; None: nobody says."""
    timings = sample.timings
    if timings is None:
        return None
    before, after = stages_of(timings)
    outside_s = max(0.0, (sample.judged_s[0] or 0.0) - timings.ttft_s)
    return Spent({**before, OUTSIDE: outside_s}, after)
