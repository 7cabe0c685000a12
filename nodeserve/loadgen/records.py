"""What is sent and what was seen. Times are seconds on this machine's monotonic clock, from the
start of the run; they travel between processes."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from nodeserve.plan.records import Arrival
from nodeserve.types import Timings

GIVEN_UP = "given_up"  # the run ended before the request did
UNSENT = "unsent"  # the run ended before its time came
WORST_SHARE = 0.1  # of a request's gaps, whose mean is its worst gap


class Job(NamedTuple):
    """One request of a run; `number` names it in all runs of the same requests."""

    number: int
    arrival: Arrival


@dataclass(slots=True)
class Sample:
    """One request as its client saw it.

    `times` has the moments at which tokens were read, `counts` how many each time; the server's own
    counts are None where it says none. `due_s` is None in a closed loop. A request that did not end
    well has the code of its error, "timeout" if it was cut off.
    """

    job: Job
    due_s: float | None
    sent_s: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ended_s: float = 0.0
    error: str | None = None
    message: str = ""
    retry_after_s: float | None = None  # that came with a refusal
    told_prompt_tokens: int | None = None
    told_output_tokens: int | None = None
    timings: Timings | None = None

    @property
    def was_sent(self) -> bool:
        return self.error != UNSENT

    @property
    def is_known(self) -> bool:
        """What became of it; not so where its run was ended before."""
        return self.error not in (GIVEN_UP, UNSENT)

    @property
    def is_short(self) -> bool:
        """Fewer tokens came than were asked for."""
        return self.num_output_tokens < self.job.arrival.num_output_tokens

    @property
    def late_s(self) -> float:
        """That it was sent behind its time."""
        return 0.0 if self.due_s is None else self.sent_s - self.due_s

    @property
    def num_output_tokens(self) -> int:
        """As the server counts them, else as they were read."""
        return sum(self.counts) if self.told_output_tokens is None else self.told_output_tokens

    @property
    def num_prompt_tokens(self) -> int:
        told = self.told_prompt_tokens
        return self.job.arrival.num_prompt_tokens if told is None else told

    @property
    def ttft_s(self) -> float | None:
        return self.times[0] - self.sent_s if self.times else None

    @property
    def e2e_s(self) -> float | None:
        """To the last token."""
        return self.times[-1] - self.sent_s if self.times else None

    @property
    def tpot_s(self) -> float | None:
        """(Last token - first token) / (tokens - 1); None with one token."""
        if not self.times or self.num_output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.num_output_tokens - 1)

    @property
    def judged_s(self) -> tuple[float | None, float | None, float | None]:
        """TTFT, TPOT and end to end as limits see them: from the due time on, so that a client that
        sends late never makes a server look better."""
        late_s = max(0.0, self.late_s)
        ttft_s, e2e_s = self.ttft_s, self.e2e_s
        return (
            None if ttft_s is None else ttft_s + late_s,
            self.tpot_s,
            None if e2e_s is None else e2e_s + late_s,
        )

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens; tokens that were read together have none between them."""
        gaps: list[float] = []
        for place, count in enumerate(self.counts):
            if place:
                gaps.append(self.times[place] - self.times[place - 1])
            gaps += [0.0] * (count - 1)
        return gaps

    @property
    def worst_gap_s(self) -> float | None:
        """Mean of the longest tenth of its gaps, one at least."""
        gaps = sorted(self.gaps_s, reverse=True)
        if not gaps:
            return None
        worst = gaps[: math.ceil(WORST_SHARE * len(gaps))]
        return math.fsum(worst) / len(worst)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What single requests take when nothing else runs: `points` are (prompt tokens, TTFT in
    seconds) by length."""

    points: tuple[tuple[int, float], ...]
    tpot_s: float

    def ttft_s(self, num_prompt_tokens: int) -> float:
        """On straight lines between the points; beyond the last one in proportion to the length,
        below the first as there."""
        first, last = self.points[0], self.points[-1]
        if num_prompt_tokens <= first[0]:
            return first[1]
        if num_prompt_tokens >= last[0]:
            return last[1] * num_prompt_tokens / last[0]
        for (low, low_s), (high, high_s) in zip(self.points, self.points[1:], strict=False):
            if num_prompt_tokens <= high:
                return low_s + (num_prompt_tokens - low) / (high - low) * (high_s - low_s)
        raise AssertionError("points ascend")

    def e2e_s(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        return self.ttft_s(num_prompt_tokens) + self.tpot_s * (num_output_tokens - 1)
