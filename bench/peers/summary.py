"""From lives to rows: the rounds of a server pooled, its goodput, and ours over the best peer's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.peers.contenders import FULL_BITS, Contender
from bench.peers.life import Life, Protocol, tokens_per_s
from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.limits import parse_limits
from nodeserve.loadgen.measure import Times, measure
from nodeserve.plan.goodput import GOAL, Tally, crossing, falling

AIM_GOODPUT = 1.5  # times the best peer's
AIM_TOKENS = 1.0  # times the best peer's with weights of 16 bits


@dataclass(frozen=True, slots=True)
class Rung:
    """A rate with the requests of all rounds."""

    rate: float
    tally: Tally
    ttft: Times | None
    tpot: Times | None
    missed: tuple[tuple[str, int], ...] = ()  # limits, by how many requests missed them


@dataclass(frozen=True, slots=True)
class Row:
    """One server. None: not measured, and `failure` says why, or it was never good enough."""

    name: str
    letter: str
    bits: int
    ours: bool
    failure: str | None
    start_s: float | None
    memory_mib: float | None
    tokens_alone: float | None  # output tokens a second
    tokens_together: float | None
    alone: Rung | None  # rate 0: one request after the other
    rungs: tuple[Rung, ...]
    goodput: float | None  # requests a second
    goodputs: tuple[float, ...]  # of single rounds
    bound: str  # "", "at least" where the ladder ends before it misses, "below" its lowest rung
    num_short: int  # answers with fewer tokens than asked for
    num_other_prompts: int  # whose length it counts otherwise
    num_late_runs: int  # in which the client could not keep time
    num_failed: int

    def at(self, rate: float) -> Rung | None:
        return next((one for one in self.rungs if one.rate == rate), None)


def row_of(contender: Contender, lives: Sequence[Life], protocol: Protocol) -> Row:
    """All rounds of one server."""
    rates = sorted({rate for life in lives for rate in life.rungs})
    rungs = tuple(
        pooled(rate, [life.rungs[rate] for life in lives if rate in life.rungs], protocol)
        for rate in rates
    )
    alone = [life.alone for life in lives if life.alone]
    together = [life.together for life in lives if life.together]
    runs = [*alone, *together, *(one for life in lives for one in life.rungs.values())]
    reports = [one.report for one in runs]
    rate, bound = goodput(rungs)
    each = [crossing(points) for life in lives if (points := shares(life.rungs))]
    return Row(
        name=contender.name,
        letter=contender.letter,
        bits=contender.bits,
        ours=contender.ours,
        failure=next((life.failure for life in lives if life.failure), None),
        start_s=smallest([life.start_s for life in lives]),
        memory_mib=mean([life.memory_mib for life in lives]),
        tokens_alone=mean([tokens_per_s(one.samples) for one in alone]),
        tokens_together=mean([tokens_per_s(one.samples) for one in together]),
        alone=pooled(0.0, alone, protocol) if alone else None,
        rungs=rungs,
        goodput=rate,
        goodputs=tuple(one for one in each if one is not None),
        bound=bound,
        num_short=sum(one.num_short for one in reports),
        num_other_prompts=sum(one.num_other_prompts for one in reports),
        num_late_runs=sum(not one.punctuality.valid for one in reports),
        num_failed=sum(one.tally.num_offered - one.num_done for one in reports),
    )


def pooled(rate: float, results: Sequence[Result], protocol: Protocol) -> Rung:
    """The runs of one rate as one: every request of every round counts once."""
    slo = parse_limits(protocol.limits)
    report = measure(
        [sample for one in results for sample in one.samples],
        lambda arrival: slo.slo(arrival, None),
        GOAL,
        settle_s=protocol.settle_s if rate else 0.0,
    )
    assert report is not None
    missed = tuple(report.missed.items())
    return Rung(rate, report.tally, report.ttft, report.tpot, missed)


def shares(rungs: Mapping[float, Result]) -> list[tuple[float, float]]:
    return falling((rate, one.report.tally) for rate, one in rungs.items())


def goodput(rungs: Sequence[Rung]) -> tuple[float | None, str]:
    """Where attainment crosses the goal, and which side of it is known where only one is."""
    found = crossing(falling((one.rate, one.tally) for one in rungs))
    if found is None:
        return None, "below" if rungs else ""
    return found, "at least" if found == max(one.rate for one in rungs) else ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours over the best peer's; None where one of them is missing."""

    what: str
    ours: str | None
    peer: str | None
    ratio: float | None
    aim: float

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio >= self.aim


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    full = [row for row in rows if row.ours or row.bits >= FULL_BITS]
    what = "tokens/s, {}, peers with weights of 16 bits"
    return [
        compared("goodput", AIM_GOODPUT, {row: row.goodput for row in rows}),
        compared(what.format("1 client"), AIM_TOKENS, {row: row.tokens_alone for row in full}),
        compared(what.format("16 clients"), AIM_TOKENS, {row: row.tokens_together for row in full}),
    ]


def compared(what: str, aim: float, values: Mapping[Row, float | None]) -> Verdict:
    """The best of ours beside the best of theirs."""
    known = {row: value for row, value in values.items() if value is not None}

    def best(ours: bool) -> Row | None:
        return max((row for row in known if row.ours is ours), key=known.__getitem__, default=None)

    mine, theirs = best(True), best(False)
    ratio = known[mine] / known[theirs] if mine and theirs and known[theirs] else None
    return Verdict(what, mine.name if mine else None, theirs.name if theirs else None, ratio, aim)


def to_json(row: Row) -> dict[str, Any]:
    """Times in ms, names as in loadgen's reports where they mean the same."""
    return {
        "name": row.name,
        "weight_bits": row.bits,
        "failure": row.failure,
        "goodput": rounded(row.goodput),
        "goodput_bound": row.bound,
        "goodput_of_rounds": [rounded(one) for one in row.goodputs],
        "start_s": rounded(row.start_s),
        "memory_mib": rounded(row.memory_mib),
        "tokens_per_s_1_client": rounded(row.tokens_alone),
        "tokens_per_s_16_clients": rounded(row.tokens_together),
        "alone": rung_json(row.alone) if row.alone else None,
        "rungs": [rung_json(one) for one in row.rungs],
        "short_outputs": row.num_short,
        "other_prompt_lengths": row.num_other_prompts,
        "late_runs": row.num_late_runs,
        "failed_requests": row.num_failed,
    }


def rung_json(rung: Rung) -> dict[str, Any]:
    times = {"ttft": rung.ttft, "tpot": rung.tpot}
    return {
        "rate": rung.rate,
        "num_offered": rung.tally.num_offered,
        "num_good": rung.tally.num_good,
        "missed": dict(rung.missed),
        **{
            f"p{level}_{name}_ms": rounded(1e3 * getattr(found, f"p{level}"))
            for name, found in times.items()
            if found is not None
            for level in (50, 90, 99)
        },
    }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "ratio": rounded(verdict.ratio), "met": verdict.met}


def smallest(values: Sequence[float | None]) -> float | None:
    """A start is as long as its shortest: the first reads files that later ones find in memory."""
    return min((one for one in values if one is not None), default=None)


def mean(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return math.fsum(known) / len(known) if known else None


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
