"""Other loads from the same requests, changed so that they stay what they are.

`workloads.at_rate` divides all times by one number: the gaps' CV, their order and the shape of
bursts stay, bursts get shorter or longer. `thin` keeps some of the requests at their times: bursts
keep their length. `scale_lengths` divides prompts and outputs alike, so that their ratio and the
share of common prefixes stay. `spread_ticks` undoes timestamps that are coarse. Copies shifted in
time, gaps drawn anew and lengths that are clipped are not here: each makes another workload of it.
"""

import hashlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from nodeserve.errors import ConfigError
from nodeserve.plan.records import Arrival

MIN_TICK_S = 1e-6
DIVISORS = (1e-3, 1e9)  # of lengths
_TWO_TO_64 = 2.0**64


@dataclass(frozen=True, slots=True)
class Traffic:
    """Arrivals and lengths in numbers. `cv` is the gaps' standard deviation over their mean, 1 for
    Poisson; `iod_*` the counts' variance over their mean in bins of 1 and 10 s, 1 for Poisson at
    any width. None: too few requests, or too short."""

    num_requests: int
    duration_s: float
    rate: float | None  # requests a second
    cv: float | None
    iod_1s: float | None
    iod_10s: float | None
    prompt_tokens: float  # mean
    output_tokens: float  # mean


def traffic(arrivals: Sequence[Arrival]) -> Traffic:
    """Statistics of requests by time, one at least."""
    times = [one.arrived_s for one in arrivals]
    gaps = [later - sooner for sooner, later in zip(times, times[1:], strict=False)]
    span_s = times[-1] - times[0]
    mean_gap_s = span_s / len(gaps) if gaps else 0.0
    return Traffic(
        num_requests=len(times),
        duration_s=span_s,
        rate=1.0 / mean_gap_s if mean_gap_s else None,
        cv=statistics.pstdev(gaps) / mean_gap_s if mean_gap_s else None,
        iod_1s=dispersion(times, 1.0),
        iod_10s=dispersion(times, 10.0),
        prompt_tokens=statistics.fmean(one.num_prompt_tokens for one in arrivals),
        output_tokens=statistics.fmean(one.num_output_tokens for one in arrivals),
    )


def dispersion(times: Sequence[float], width_s: float) -> float | None:
    """Variance over mean of the counts in whole bins of `width_s`; None with fewer than two."""
    num_bins = int((times[-1] - times[0]) / width_s)
    if num_bins < 2:
        return None
    counts = Counter(int((one - times[0]) / width_s) for one in times)
    bins = [counts[place] for place in range(num_bins)]
    mean = statistics.fmean(bins)
    return statistics.pvariance(bins) / mean if mean else None


def thin(arrivals: Sequence[Arrival], share: float, seed: int = 0) -> list[Arrival]:
    """About `share` of the requests (above 0, at most 1), at their own times.

    Requests that share a prefix go or stay together; the first block alone does not count, for most
    prompts may begin with one system prompt. Chosen by a hash, so that a smaller share is part of a
    larger one.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"a share of {share:g} of the requests: use more than 0, at most 1")
    return [one for place, one in enumerate(arrivals) if _hash(_tree(one, place), seed) < share]


def _tree(arrival: Arrival, place: int) -> str:
    if len(arrival.block_ids) > 1:
        return f"block {arrival.block_ids[1]}"
    return f"row {place}"


def _hash(name: str, seed: int) -> float:
    """A number from 0 to 1, the same in every process."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / _TWO_TO_64


def scale_lengths(arrivals: Sequence[Arrival], divisor: float) -> list[Arrival]:
    """Prompts and outputs divided by `divisor` (above 0) and rounded up.

    A block of a shared prefix has 512 / `divisor` tokens then.
    """
    check_divisor(divisor)
    return [
        one._replace(
            num_prompt_tokens=max(1, math.ceil(one.num_prompt_tokens / divisor)),
            num_output_tokens=max(1, math.ceil(one.num_output_tokens / divisor)),
        )
        for one in arrivals
    ]


def check_divisor(divisor: float) -> None:
    """ConfigError for what no lengths can be divided by."""
    if not DIVISORS[0] <= divisor <= DIVISORS[1]:
        raise ConfigError(
            f"lengths divided by {divisor:g} (--scale-lengths): use a number from {DIVISORS[0]:g}"
            f" to {DIVISORS[1]:g}, such as 16"
        )


def fit_context(arrivals: Sequence[Arrival], max_tokens: int) -> list[Arrival]:
    """Those whose prompt and output fit `max_tokens` together; dropped, never clipped."""
    fitting = [
        one for one in arrivals if one.num_prompt_tokens + one.num_output_tokens <= max_tokens
    ]
    if not fitting:
        raise ConfigError(
            f"no request fits a context of {max_tokens} tokens: divide the lengths"
            " (--scale-lengths), or take a larger context"
        )
    return fitting


def spread_ticks(arrivals: Sequence[Arrival], tick_s: float, seed: int = 0) -> list[Arrival]:
    """Requests that share a timestamp, at random times within its tick; their order stays."""
    if not MIN_TICK_S <= tick_s < math.inf:
        raise ConfigError(
            f"ticks of {tick_s:g} s (--spread-ticks): use {MIN_TICK_S:g} s or more, such as 3"
        )
    random = Random(f"ticks {seed}")
    ticks: dict[int, list[Arrival]] = defaultdict(list)
    for one in arrivals:
        ticks[math.floor(one.arrived_s / tick_s + 1e-9)].append(one)
    spread = []
    for tick, members in sorted(ticks.items()):
        places = sorted(random.random() for _ in members)
        spread += [
            one._replace(arrived_s=(tick + place) * tick_s)
            for one, place in zip(members, places, strict=True)
        ]
    return spread


def cut_window(arrivals: Sequence[Arrival], from_s: float, to_s: float) -> list[Arrival]:
    """Those that arrive from `from_s` on and before `to_s`, with `from_s` as time 0."""
    inside = [one for one in arrivals if from_s <= one.arrived_s < to_s]
    if not inside:
        raise ConfigError(f"no request arrives between {from_s:g} and {to_s:g} s")
    return [one._replace(arrived_s=one.arrived_s - from_s) for one in inside]
