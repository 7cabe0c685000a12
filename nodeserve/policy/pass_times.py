"""How long a pass takes: learned from those that ended.

The mean is a moving average whose outliers (a compilation, a garbage collection) count as a quarter
of the median or as four times it. The prediction is a fit of policy.cost's formula to the passes
seen, older ones forgotten; passes with prefill work and pure decode passes are fitted apart, since
their fixed parts differ.

The formula's maximum over ranks is not linear; it is once one knows which rank is the slowest. The
fit so far says that, and the better it gets the better it says it.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence

from nodeserve.policy.cost import RankWork

LEAST_PASSES = 3  # of a kind before its fit says anything
LONGEST_S = 86_400.0  # a day: what takes longer is a clock gone wrong
CUT = 4.0  # an outlier counts as so many medians, or as one such part of the median
MEMORY_PREFILL, MEMORY_DECODE = 128, 1024  # passes; decode steps are many and much alike
RIDGE, FIRST_RIDGE = 1e-4, 0.1  # shares of a feature's mean square: for ever, and over num_seen
SPREADS = 4.0  # a pass further off than so many usual errors counts as that far off
CHANGED = 8  # so many such passes in a row are no outliers: what was learned before is wrong
LEAST_TOLERANCE = 0.05  # share of the prediction; nothing nearer than that is cut


class PassTimes:
    """Of all instances of one kind together."""

    def __init__(self, num_history: int = 64) -> None:
        self._recent: deque[float] = deque(maxlen=num_history)
        self._sorted: list[float] = []  # the same
        self._prefill, self._decode = _Fit(MEMORY_PREFILL), _Fit(MEMORY_DECODE)

    @property
    def mean_s(self) -> float | None:
        """Mean of the last passes, outliers cut; None before the first."""
        times = self._sorted
        if not times:
            return None
        low, high = _median(times) / CUT, _median(times) * CUT
        first, last = bisect_left(times, low), bisect_right(times, high)
        return (low * first + sum(times[first:last]) + high * (len(times) - last)) / len(times)

    def observe(self, ranks: Sequence[RankWork], seconds: float) -> None:
        """A pass with this work, an entry for each rank, took so long."""
        if not 0 <= seconds < LONGEST_S:
            return
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        self._fit_of(ranks).observe(ranks, seconds)

    def predict_s(self, ranks: Sequence[RankWork]) -> float | None:
        """What a pass with this work will take; None before the first was seen. Never far outside
        the times seen."""
        fit, times = self._fit_of(ranks), self._sorted
        if not fit.num_learned:
            return self.mean_s
        highest = min(times[-1], CUT * _median(times))
        return min(max(fit.predict_s(ranks), times[0] / CUT), CUT * highest)

    def level_s(self, num_tokens: int, num_ranks: int) -> float:
        """Predicted seconds of a pass with a prompt of so many tokens, from its start, on each of
        so many ranks; 0 before any pass was seen."""
        work = RankWork(num_tokens, num_tokens * num_tokens / 2)
        return self.predict_s([work] * num_ranks) or 0.0

    def decode_costs(self, least_passes: int) -> tuple[float, float] | None:
        """Seconds that one more sequence, and one more token of context, add to the slowest rank of
        a pure decode pass; None before so many of those, or while neither shows."""
        *_, seq_s, kv_token_s, _ = self._decode.weights
        learned = self._decode.num_learned >= least_passes and (seq_s > 0 or kv_token_s > 0)
        return (seq_s, kv_token_s) if learned else None

    def _fit_of(self, ranks: Sequence[RankWork]) -> "_Fit":
        for work in ranks:
            if work.prefill_tokens:
                return self._prefill
        return self._decode


def _median(times: Sequence[float]) -> float:
    half = len(times) // 2
    return times[half] if len(times) % 2 else (times[half - 1] + times[half]) / 2


class _Fit:
    """Seconds = their mean + weights * (features - their means), by weighted least squares.

    Features are RankWork's fields of the slowest rank, then the tokens of all ranks over their
    number; `weights`, in seconds for one of each, are never negative. Means and covariances forget
    with a memory of so many passes. A ridge that shrinks with the passes seen draws weights to 0:
    features that never vary, or only together with others, cannot blow up. Each pass takes one
    round of coordinate descent from the weights before, which centred features make enough.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._start()

    def _start(self) -> None:
        self.num_learned = 0
        self.weights = [0.0] * 5
        self._first: list[tuple[Sequence[RankWork], float]] = []
        self._means = [0.0] * 5
        self._mean_s = 0.0
        self._covariances = [[0.0] * 5 for _ in range(5)]
        self._with_s = [0.0] * 5  # covariances of the features with the seconds
        self._trust = 0.0  # sum of what the passes count
        self._error = 1.0  # the usual one of a prediction, as a share of it
        self._num_cut = 0  # in a row
        self._varied: list[int] = []  # features that ever were; rows of others are 0

    def predict_s(self, ranks: Sequence[RankWork]) -> float:
        return self._line(self._features(ranks))

    def observe(self, ranks: Sequence[RankWork], seconds: float) -> None:
        if self.num_learned:
            features = self._features(ranks)
            predicted_s = self._line(features)
            usual_s = max(predicted_s, self._mean_s / CUT)
            self._learn(features, predicted_s + self._cut(seconds - predicted_s, usual_s), usual_s)
            if self._num_cut == CHANGED:
                self._start()
            return
        self._first.append((tuple(ranks), seconds))
        if len(self._first) == LEAST_PASSES:
            for early, seconds in self._first:
                self._learn(self._features(early), seconds, seconds)
            self._first.clear()

    def _features(self, ranks: Sequence[RankWork]) -> Sequence[float]:
        if len(ranks) == 1:
            return (*ranks[0], 0.0)
        token_s, attention_s, seq_s, kv_token_s, _ = self.weights
        slowest, longest_s, num_tokens = ranks[0], -1.0, 0
        for work in ranks:
            tokens, attention, decodes, kv_tokens = work
            num_tokens += tokens + decodes
            own_s = token_s * tokens + attention_s * attention
            own_s += seq_s * decodes + kv_token_s * kv_tokens
            if own_s > longest_s or (own_s == longest_s and work > slowest):
                slowest, longest_s = work, own_s
        return (*slowest, num_tokens / len(ranks))  # of one rank, the latter says nothing

    def _line(self, features: Sequence[float]) -> float:
        weights, means, offset_s = self.weights, self._means, 0.0
        for i in self._varied:  # the weights of all others are 0
            offset_s += weights[i] * (features[i] - means[i])
        return self._mean_s + offset_s

    def _cut(self, off_s: float, usual_s: float) -> float:
        """An outlier's distance from its prediction is cut, less so that of one after another."""
        widest = usual_s * max(SPREADS * self._error, LEAST_TOLERANCE)
        cut_s = min(max(off_s, -widest), widest)
        self._num_cut = 0 if cut_s == off_s else self._num_cut + 1
        if usual_s > 0:
            self._error += (abs(cut_s) / usual_s - self._error) / 16
        return cut_s

    def _learn(self, features: Sequence[float], seconds: float, usual_s: float) -> None:
        """Errors are a share of what a pass takes: `usual_s` says how much this one counts. So of
        the first few, an outlier counts next to nothing."""
        self.num_learned += 1
        trust = 1 / max(usual_s, 1e-9) ** 2
        self._trust += trust - self._trust / self.memory
        share = trust / self._trust
        keep, means, covariances, with_s = 1 - share, self._means, self._covariances, self._with_s
        off_s = share * (seconds - self._mean_s)
        self._mean_s += off_s
        varied = self._varied
        if len(varied) < len(means):
            varied = self._varied = [i for i, value in enumerate(features) if value or i in varied]
        off = [features[i] - means[i] for i in varied]
        for i, offset in zip(varied, off, strict=True):
            row = covariances[i]
            step = share * offset
            means[i] += step
            with_s[i] = keep * (with_s[i] + off_s * offset)
            for j, other in zip(varied, off, strict=True):
                row[j] = keep * (row[j] + step * other)
        self._descend()

    def _descend(self) -> None:
        ridge = RIDGE + FIRST_RIDGE / self.num_learned
        weights, means, with_s, varied = self.weights, self._means, self._with_s, self._varied
        for i in varied:
            row = self._covariances[i]
            own = row[i]
            drawn = own + ridge * (own + means[i] ** 2)
            if drawn > 0:
                others = 0.0
                for j in varied:
                    others += row[j] * weights[j]
                weight = (with_s[i] - (others - own * weights[i])) / drawn
                weights[i] = weight if weight > 0.0 else 0.0
