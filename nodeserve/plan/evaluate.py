"""How many requests of a workload a candidate serves in time: one simulation, or a search of rates.

Candidates see the same requests: gaps and lengths come from streams that depend on the seed alone
(common random numbers), so two candidates differ by what they are and not by what they drew.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from nodeserve.errors import ConfigError
from nodeserve.layout import Shape
from nodeserve.plan.candidates import Candidate
from nodeserve.plan.goodput import CONFIDENCE, GOAL, Slo, Tally
from nodeserve.plan.records import Arrival, Scenario, Served
from nodeserve.plan.requests import Requests, Source
from nodeserve.plan.search import Found, Probe, SearchOptions, find_goodput
from nodeserve.plan.sentence import Sentence
from nodeserve.plan.simulator import Simulation
from nodeserve.plan.summary import kept
from nodeserve.plan.workloads import at_rate
from nodeserve.policy.flow import FlowOptions
from nodeserve.policy.profile import Family, Profile
from nodeserve.policy.units import DispatchOptions

STAYS = 3.0  # a run lasts so many stays of a request that just meets its limits
DISPATCH = DispatchOptions()
FLOW = FlowOptions(4096, 1 << 22)  # a server's own bounds


@dataclass(frozen=True, slots=True)
class Question:
    """What a layout is wanted for."""

    model: Profile | Family
    traffic: Source | tuple[Arrival, ...]
    slo: Slo
    num_gpus: int
    eps: tuple[int, ...] = (1,)  # expert parallel degrees to try
    shapes: tuple[Shape, ...] | None = None  # that instances may have; None: every one known
    goal: float = GOAL
    confidence: float = CONFIDENCE
    seed: int = 0
    transit_s: float | None = None  # None: the profile's
    noise: float | None = None
    max_num_seqs: int | None = None  # None: the profile's
    max_model_len: int | None = None  # likewise; longer requests are left out of a source
    max_num_batched_tokens: int | None = None  # None: what is best
    dispatch: DispatchOptions = DISPATCH  # a window other than auto is kept
    decode_allocation: str = "cost"
    one_token: bool = False  # requests end with their first

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ConfigError(f"--gpus {self.num_gpus}: use 1 or more")
        if self.slo.ttft_s is None and self.slo.tpot_s is None and self.slo.e2e_s is None:
            raise ConfigError("a plan needs limits: give --slo such as ttft=500ms,tpot=50ms")
        if (self.max_num_batched_tokens or self.num_seqs) < self.num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) is below"
                f" --max-num-seqs ({self.num_seqs}): a step could not hold them all"
            )

    @property
    def any_profile(self) -> Profile:
        """For what does not depend on the shape."""
        model = self.model
        return next(iter(model.ranks.values())) if isinstance(model, Family) else model

    @property
    def num_seqs(self) -> int:
        return self.max_num_seqs or self.any_profile.max_num_seqs

    @property
    def context(self) -> int:
        """Tokens that a prompt and its output may have."""
        return self.max_model_len or self.any_profile.max_model_len

    def requests(self, rate: float, num_requests: int) -> list[Arrival]:
        """The first so many, so many a second; a trace has no more than it has."""
        if isinstance(self.traffic, Source):
            arrivals = requests_of(self.traffic, self.context).first(num_requests, rate)
        else:
            arrivals = at_rate(self.traffic, rate)[:num_requests]
        slo, one_token = self.slo, self.one_token
        return [
            one._replace(
                num_output_tokens=1 if one_token else one.num_output_tokens,
                ttft_slo_s=slo.ttft_s,
                tpot_slo_s=slo.tpot_s,
            )
            for one in arrivals
        ]

    def lengths(self, num_requests: int = 1000) -> list[tuple[int, int]]:
        """Prompt and output tokens of a sample."""
        return [
            (one.num_prompt_tokens, one.num_output_tokens)
            for one in self.requests(1.0, num_requests)
        ]

    def scenario(self, candidate: Candidate) -> Scenario:
        """A node that refuses what would be late, as a server with these SLOs does."""
        return Scenario(
            layout=candidate.layout,
            profile=self.model,
            dispatch=replace(
                self.dispatch,
                window_s=candidate.window_s,
                budget=candidate.max_num_batched_tokens,
                max_num_seqs=self.num_seqs,
            ),
            decode_allocation=self.decode_allocation,
            flow=FLOW,
            seed=self.seed,
            noise=self.noise,
            transit_s=self.transit_s,
        )


@lru_cache(maxsize=4)
def requests_of(source: Source, max_tokens: int) -> Requests:
    """Drawn or read once in a process: a search asks for them again and again."""
    return Requests(source, max_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """One search. `stay_s` is how long a request stays that just meets its limits, `most_requests`
    how many there may be in a run, however long it should last."""

    question: Question
    candidate: Candidate
    options: SearchOptions
    stay_s: float
    most_requests: int


def stay_s(question: Question, mean_output: float) -> float:
    """How long a request is there at most if it is good, on average: its limits say."""
    slo = question.slo
    limits = (slo.ttft_s or 0.0) + mean_output * (slo.tpot_s or 0.0)
    return limits if slo.e2e_s is None else min(limits or slo.e2e_s, slo.e2e_s)


def search(job: Job) -> Found:
    """The goodput of a candidate, in requests a second of the whole layout."""

    known: dict[tuple[float, int], Tally] = {}

    options = job.options
    # Who looks once only asks whether the goal is met; who would look again wants to be sure.
    again = options.min_requests < options.max_requests
    sure = options.look_confidence if again else None

    def ask(rate: float, num_requests: int) -> Probe:
        # A run that ends before memory has filled, and queues have grown, would flatter the layout.
        lasting = ceil(STAYS * job.stay_s * rate * num_requests / job.options.min_requests)
        number = min(max(num_requests, lasting), job.most_requests)
        if (rate, number) not in known:
            known[rate, number], _ = count(job.question, job.candidate, rate, number, sure)
        return Probe(rate, known[rate, number])

    return find_goodput(ask, job.options)


def count(
    question: Question,
    candidate: Candidate,
    rate: float,
    num_requests: int,
    sure: float | None = None,
) -> tuple[Tally, Counter[str]]:
    """Good requests of a run without its beginning and end; and what the others missed: limits by
    name, or the error that they ended with. The run ends when it has shown enough (`Sentence`),
    with the confidence `sure` if given; the tally has the rest as unknown."""
    arrivals = question.requests(rate, num_requests)
    counted = kept(arrivals)
    first_s, last_s = counted[0].arrived_s, counted[-1].arrived_s
    sentence = Sentence(question.goal, len(counted), sure)
    num_before = arrivals.index(counted[0])
    misses: Counter[str] = Counter()

    def note(served: Served) -> None:
        if first_s <= served.arrival.arrived_s <= last_s:
            missed = missed_by(served, question.slo)
            sentence.note(bool(missed), simulation.num_arrived - num_before)
            misses.update(missed)

    simulation = Simulation(question.scenario(candidate), arrivals, keeps_passes=False)
    simulation.ended = note
    simulation.start()
    while simulation.num_open and not sentence.is_over:
        if not simulation.turn():
            raise AssertionError(f"{simulation.num_open} requests wait for nothing")
    return sentence.tally, misses


def missed_by(served: Served, slo: Slo) -> tuple[str, ...]:
    """The limits that a request missed; a refused one would have missed it, and for want of room
    its first token's."""
    if served.outcome == "overloaded":
        return (served.refused_for or "ttft",)
    if served.outcome not in ("stop", "length"):
        return (served.outcome,)
    e2e_s = served.ended_s - served.arrival.arrived_s
    return slo.missed(served.timings.ttft_s, served.tpot_s, e2e_s)


def decided_range(
    probes: Sequence[Probe], goal: float, confidence: float
) -> tuple[float, float | None]:
    """The highest rate that surely passes, 0 if none, and the lowest above it that surely does
    not; None where none was asked."""
    sure = [one for one in probes if one.decided(goal, confidence)]
    low = max((one.rate for one in sure if one.tally.share >= goal), default=0.0)
    high = min(
        (one.rate for one in sure if one.tally.share < goal and one.rate > low), default=None
    )
    return low, high


def with_start(options: SearchOptions, start: float, low: float, high: float) -> SearchOptions:
    """The same search from another rate."""
    return replace(options, start=start, low=low, high=high)
