"""One simulated run of one arm, and what is kept of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.window.grid import BY_LETTER, PROFILE, WORKLOAD, Arm, Shape
from bench.window.stats import Samples, p99
from nodeserve.plan.records import Arrival, Faults, Outcome, Scenario
from nodeserve.plan.simulator import simulate
from nodeserve.plan.summary import STAGES, Summary, kept, summarize
from nodeserve.plan.workloads import Workload, at_rate, generate, parse_gaps, parse_lengths
from nodeserve.policy.cost import IDLE, RankWork

MEASURES = (
    *("mean_s", "p99_s"),  # TTFT
    *STAGES,  # means
    *("pass_s", "utilisation", "balance", "active", "busy"),
    "idle_wait_s",  # the longest that a request waited in the buffer beside an idle instance
)
KILL_AFTER = 1 / 3  # of the time in which requests arrive
OVERLOAD = 1.5  # times what is possible
TRANSIT_S = 0.0025


@dataclass(frozen=True, slots=True)
class Run:
    """`measures` by name; the TTFT of the requests that count, in order of arrival."""

    ttft_s: Samples
    measures: dict[str, float]
    num_lost: int


@dataclass(frozen=True, slots=True)
class Saturation:
    """What a shape can do with prompts of one kind."""

    qps: float  # that arm C completes when overloaded
    ceiling_qps: float  # with every token slot of every pass used
    floor_s: float  # mean TTFT if every request met an idle node


def serve(arm: Arm, shape: Shape, requests: Sequence[Arrival], seed: int) -> Run:
    """Serve a trace."""
    first_s, last_s = requests[0].arrived_s, requests[-1].arrived_s
    faults = arm.faults(shape, first_s + KILL_AFTER * (last_s - first_s))
    scenario = _scenario(arm, shape, seed, faults)
    outcome = simulate(scenario, requests)
    ttft_s = np.array([one.timings.ttft_s for one in kept(outcome.served)], dtype=np.float32)
    measures = _measures(summarize(outcome, scenario), ttft_s)
    measures["idle_wait_s"] = _idle_wait_s(outcome, shape, faults)
    return Run(ttft_s, measures, sum(one.outcome != "length" for one in outcome.served))


def trace(arrivals: str, lengths: str, qps: float, seed: int, num_requests: int) -> list[Arrival]:
    """Requests with one output token."""
    workload = Workload(
        qps,
        num_requests,
        parse_lengths(lengths),
        parse_lengths("fixed:1"),
        parse_gaps(arrivals),
        seed,
    )
    return generate(workload, PROFILE.max_model_len)


def saturation(shape: Shape, lengths: str, seeds: Sequence[int], num_requests: int) -> Saturation:
    """Offer more than any dispatch could serve and see what arm C completes, from the first to the
    last fifth of all completions; mean over seeds."""
    traces = [trace(WORKLOAD[0], lengths, 1.0, seed, num_requests) for seed in seeds]
    prompts = [one.num_prompt_tokens for requests in traces for one in requests]
    ceiling_qps = _ceiling_qps(shape, prompts)
    found = []
    for seed, requests in zip(seeds, traces, strict=True):
        scenario = _scenario(BY_LETTER["C"], shape, seed, Faults())
        outcome = simulate(scenario, at_rate(requests, OVERLOAD * ceiling_qps))
        ends = sorted(one.ended_s for one in outcome.served)
        first, last = len(ends) // 5, 4 * len(ends) // 5
        found.append((last - first) / (ends[last] - ends[first]))
    return Saturation(sum(found) / len(found), ceiling_qps, _floor_s(shape, prompts))


def _scenario(arm: Arm, shape: Shape, seed: int, faults: Faults) -> Scenario:
    return Scenario(
        layout=shape.layout,
        profile=PROFILE.name,
        dispatch=arm.dispatch,
        seed=seed,
        transit_s=TRANSIT_S,
        faults=faults,
        engine=arm.engine,
    )


def _measures(summary: Summary | None, ttft_s: Samples) -> dict[str, float]:
    if summary is None or summary.prefill is None:
        raise RuntimeError("no request of a run ended well: nothing can be compared")
    passes = summary.prefill
    return {
        "mean_s": float(ttft_s.mean()),
        "p99_s": p99(ttft_s),
        **{stage: spread.mean for stage, spread in summary.stages.items()},
        "pass_s": passes.mean_s,
        "utilisation": passes.chunk_utilisation,
        "balance": passes.balance,
        "active": passes.active_ranks,
        "busy": passes.busy_share,
    }


def _ceiling_qps(shape: Shape, prompts: Sequence[int]) -> float:
    """Every rank of every pass has its whole budget of tokens. A prompt of n tokens has n * n / 2
    pairs to attend to, however it is cut."""
    tokens, budget = sum(prompts), PROFILE.max_num_batched_tokens
    pairs = sum(n * n / 2 for n in prompts)
    full = [RankWork(budget, budget * pairs / tokens)] * shape.ranks
    tokens_per_s = shape.instances * shape.ranks * budget / PROFILE.cost.pass_s(full)
    return tokens_per_s * len(prompts) / tokens


def _floor_s(shape: Shape, prompts: Sequence[int]) -> float:
    """Mean TTFT of prompts that have an instance for themselves: passes, and two ways."""
    budget, idle = PROFILE.max_num_batched_tokens, [IDLE] * (shape.ranks - 1)
    total_s = 0.0
    for length in prompts:
        for start in range(0, length, budget):
            count = min(budget, length - start)
            work = RankWork(count, count * (start + count / 2))
            total_s += PROFILE.cost.pass_s([work, *idle])
    return total_s / len(prompts) + 2 * TRANSIT_S


def _idle_wait_s(outcome: Outcome, shape: Shape, faults: Faults) -> float:
    # What came back from a dead instance waited twice, and its record has only the sum.
    waits = [
        (one.arrival.arrived_s, one.arrival.arrived_s + one.timings.scheduler_wait_s)
        for one in outcome.served
        if not one.timings.num_preemptions
    ]
    return longest_idle_wait_s(waits, idle_times(outcome, shape, faults))


def longest_idle_wait_s(
    waits: Sequence[tuple[float, float]], idle: Sequence[tuple[float, float]]
) -> float:
    """The longest overlap of a request's wait in the buffer with an instance's idle time; both are
    (from, to) in seconds."""
    longest = 0.0
    starts, ends = np.array([wait for wait in waits if wait[1] > wait[0]] or [(0.0, 0.0)]).T
    for begin_s, end_s in idle:
        if end_s - begin_s > longest:
            overlaps = np.minimum(ends, end_s) - np.maximum(starts, begin_s)
            longest = max(longest, float(overlaps.max()))
    return longest


def idle_times(outcome: Outcome, shape: Shape, faults: Faults) -> list[tuple[float, float]]:
    """When each living instance ran no pass."""
    times = []
    for instance in range(shape.instances):
        killed = instance == faults.kill_instance
        until_s = faults.kill_at_s if killed else outcome.duration_s
        free_s = 0.0
        for one in outcome.passes:
            if one.instance == instance:
                times.append((free_s, one.began_s))
                free_s = one.began_s + one.seconds
        times.append((free_s, until_s))
    return times
