"""How many requests meet their SLO, and what the others died of: since the start, and lately.

A request counts when it ends, or is refused for want of time or room. One that its client cancels
counts only if it had missed a limit by then, one that the node's own stop ends never. Those without
an SLO are in the times and in no share. A request that ends costs O(1), a token nothing.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from nodeserve.blame import CLIENT, DECODE, FAILED, REFUSED, Spent, culprit, expected, stages_of
from nodeserve.metrics import Key, Sliding, highest_s, place_of, places, quantile_s
from nodeserve.policy.flow import NO_OBJECTIVE
from nodeserve.policy.window import Mean
from nodeserve.types import Slo, Timings

SPANS_S = (10, 60, 300)
POINT_S = 5  # of the longest span's buckets: the points of a curve
NUM_MISSES = 20  # remembered one by one
SHARES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
CURVE_SHARE = 0.90
COARSE = 4  # places of a histogram that are told as one
OFFERED, GOOD, ENDED = "offered", "good", "ended"
TTFT, TPOT = "ttft", "tpot"
_MISSED = "missed "  # before what is to blame


class Ended(NamedTuple):
    """A request that is over. `outcome` is finished, cancelled or failed; `client_wait_s` is what
    its first token waited for the client to read."""

    request_id: int
    outcome: str
    slo: Slo
    timings: Timings
    client_wait_s: float
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Up to now, if there was none."""
        return self.timings.ttft_s + self.client_wait_s

    @property
    def tpot_s(self) -> float | None:
        gaps = self.num_output_tokens - 1
        return self.timings.decode_s / gaps if gaps > 0 else None


class Ledger:
    """`now_s` never goes back."""

    def __init__(self, now_s: float) -> None:
        self._totals: Counter[Key] = Counter()  # OFFERED, GOOD, and misses by blame
        self._fresh: Counter[Key] = Counter()  # of the present second, and in no span yet
        self._fresh_s = int(now_s)
        self._started_s = now_s
        *short, longest = SPANS_S
        self._curve = Sliding(longest, POINT_S)
        self._spans = [*map(Sliding, short), self._curve]
        # Seconds of each stage of good requests; of decoding, for each token after the first.
        self._usual: defaultdict[str, Mean] = defaultdict(Mean)
        self._misses: deque[tuple[float, dict[str, Any]]] = deque(maxlen=NUM_MISSES)
        self._points: deque[tuple[int, dict[str, Any]]] = deque(maxlen=longest // POINT_S)

    # ---- what happens

    def begin(self, now_s: float) -> None:
        """Requests may come from now on: rates are of the time since then."""
        self._started_s = now_s

    def ended(self, one: Ended, now_s: float) -> str | None:
        """Count it; what made it miss its SLO, if it did."""
        keys: list[Key] = []
        if one.outcome == "finished":
            keys += [ENDED, (TTFT, place_of(one.ttft_s))]
            if (tpot_s := one.tpot_s) is not None:
                keys.append((TPOT, place_of(tpot_s)))
        word = None
        if one.slo != NO_OBJECTIVE:
            word = self._judge(one)
            if one.outcome == "finished" or word is not None:
                keys += [OFFERED, GOOD if word is None else _MISSED + word]
        if word is not None:
            self._misses.append((now_s, told(one, word)))
        self._count(keys, now_s)
        return word

    def refused(self, slo: Slo, now_s: float) -> None:
        """It was not let in."""
        if slo != NO_OBJECTIVE:
            self._count([OFFERED, _MISSED + REFUSED], now_s)

    def _judge(self, one: Ended) -> str | None:
        if one.outcome == "failed":
            return FAILED
        before, after = stages_of(one.timings)
        spent = Spent({**before, CLIENT: one.client_wait_s}, after)
        gaps = max(0, one.num_output_tokens - 1)
        missed = one.slo.missed(one.ttft_s, one.tpot_s)
        if missed:
            usual = {name: mean.value for name, mean in self._usual.items()}
            return culprit(spent, missed, expected(usual, one.slo, gaps))
        if one.outcome == "finished":
            self._learn(spent, gaps)
        return None

    def _learn(self, spent: Spent, gaps: int) -> None:
        usual = self._usual
        for name, seconds in spent.before.items():
            usual[name].add(seconds)
        if gaps:
            for name, seconds in spent.after.items():
                usual[name].add(seconds / gaps if name == DECODE else seconds)

    def _count(self, keys: list[Key], now_s: float) -> None:
        if int(now_s) != self._fresh_s:
            self._fold(now_s)
        fresh = self._fresh
        for key in keys:
            fresh[key] += 1

    def _fold(self, now_s: float) -> None:
        """What was counted goes into the spans, once a second or before a look at them."""
        if self._fresh:
            for span in self._spans:
                span.add(self._fresh, self._fresh_s)
            self._totals.update(self._fresh)
            self._fresh.clear()
        self._fresh_s = int(now_s)

    # ---- what is told, as docs/protocol.md says

    def stats(self, now_s: float) -> dict[str, Any]:
        """The numbers of `goodput`."""
        self._fold(now_s)
        for span in self._spans:
            span.forget(now_s)
        counts = self._curve.counts
        return {
            "spans": [self._span(span, now_s) for span in self._spans],
            "total": summed(self._totals),
            "series": self._series(now_s),
            "histograms": {f"{name}_ms": coarse(places(counts, name)) for name in (TTFT, TPOT)},
            "misses": [
                {"ago_s": now_s - then_s, **miss} for then_s, miss in reversed(self._misses)
            ],
        }

    def _span(self, span: Sliding, now_s: float) -> dict[str, Any]:
        covered_s, counts = span.covered_s(now_s, self._started_s), span.counts
        judged = summed(counts)
        return {
            "seconds": span.span_s,
            **judged,
            "attainment": share_of(judged),
            "goodput_per_s": judged["good"] / covered_s,
            "ended_per_s": counts[ENDED] / covered_s,
            **{f"{name}_ms": quantiles_ms(places(counts, name)) for name in (TTFT, TPOT)},
        }

    def _series(self, now_s: float) -> dict[str, Any]:
        """A point for each POINT_S that is over; None where nothing ended. Each is made once."""
        present, begun = int(now_s // POINT_S), int(self._started_s // POINT_S)
        made, buckets = dict(self._points), dict(self._curve.buckets)
        numbers = range(max(begun, present + 1 - self._curve.span_s // POINT_S), present)
        for number in numbers:
            if number not in made:
                made[number] = point_of(buckets.get(number, Counter()))
                self._points.append((number, made[number]))
        points = [made[number] for number in numbers]
        names = ("attainment", "goodput_per_s", "ttft_p90_ms", "tpot_p90_ms")
        return {"step_s": POINT_S, **{name: [one[name] for one in points] for name in names}}


def summed(counts: Mapping[Key, int]) -> dict[str, Any]:
    """Offered, good and missed ones by blame, most first."""
    missed = {
        key.removeprefix(_MISSED): count
        for key, count in counts.items()
        if isinstance(key, str) and key.startswith(_MISSED)
    }
    ordered = dict(sorted(missed.items(), key=lambda item: -item[1]))
    return {"offered": counts.get(OFFERED, 0), "good": counts.get(GOOD, 0), "missed": ordered}


def share_of(judged: Mapping[str, Any]) -> float | None:
    """The attainment; None: nothing was offered."""
    return judged["good"] / judged["offered"] if judged["offered"] else None


def quantiles_ms(histogram: Mapping[int, int]) -> dict[str, float] | None:
    """By the names of SHARES, with how many there are; None: there are none."""
    if not histogram:
        return None
    found = {name: quantile_s(histogram, share) or 0.0 for name, share in SHARES.items()}
    return {"count": sum(histogram.values()), **{name: 1e3 * s for name, s in found.items()}}


def point_of(bucket: Counter[Key]) -> dict[str, Any]:
    """One point of the curves."""
    judged = summed(bucket)
    nineties = {
        f"{name}_p90_ms": quantile_s(places(bucket, name), CURVE_SHARE) for name in (TTFT, TPOT)
    }
    return {
        "attainment": share_of(judged),
        "goodput_per_s": judged["good"] / POINT_S,
        **{name: None if one is None else 1e3 * one for name, one in nineties.items()},
    }


def coarse(histogram: Mapping[int, int]) -> list[list[float]]:
    """As [longest ms, count], COARSE places together; none is left out between two."""
    joined: Counter[int] = Counter()
    for place, count in histogram.items():
        joined[-(-place // COARSE)] += count
    if not joined:
        return []
    return [
        [1e3 * highest_s(COARSE * place), joined[place]]
        for place in range(min(joined), max(joined) + 1)
    ]


def told(one: Ended, word: str) -> dict[str, Any]:
    """A miss, for people."""
    limits = {"ttft_ms": one.slo.ttft_s, "tpot_ms": one.slo.tpot_s}
    return {
        "request": one.request_id,
        "ttft_ms": 1e3 * one.ttft_s,
        "tpot_ms": None if one.tpot_s is None else 1e3 * one.tpot_s,
        "slo": {name: 1e3 * limit for name, limit in limits.items() if limit is not None},
        "prompt_tokens": one.num_prompt_tokens,
        "output_tokens": one.num_output_tokens,
        "blame": word,
        "prefill_worker": one.timings.prefill_worker,
        "decode_worker": one.timings.decode_worker,
    }
