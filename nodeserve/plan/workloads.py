"""Requests for a simulation: synthetic arrivals and lengths, or a trace.

Gaps, prompts and outputs come from random streams of their own: with one seed two workloads that
differ in their rate, or in one kind of length, agree in all the rest, so runs can be compared pair
by pair.
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nodeserve.errors import ConfigError
from nodeserve.plan.grids import Grid
from nodeserve.plan.records import Arrival

SIGMA = 0.8  # of a log-normal length, unless it is given
ALPHA = 1.2  # of a Pareto length's tail, likewise
MOST_TOKENS = 32_768  # that a Pareto length may have, likewise
MAX_SIGMA = 5.0
MAX_ALPHA = 10.0
BLOCK_TOKENS = 512  # of a trace's shared prefixes
MAX_TRACE_TOKENS = 1 << 24  # of one length
MAX_TRACE_BLOCKS = 1 << 24  # that the rows of a trace name, all together
TRACE_COLUMNS = ("arrival_s", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Gaps:
    """Times between arrivals: gamma distributed. `cv` is the standard deviation over the mean: 1
    is a Poisson process, more is bursty, 0 an even beat."""

    cv: float = 1.0

    def draw(self, random: Random) -> float:
        """A gap of mean 1."""
        if self.cv == 0.0:
            return 1.0
        if self.cv == 1.0:
            return random.expovariate(1.0)
        return random.gammavariate(self.cv**-2, self.cv**2)


@dataclass(frozen=True, slots=True)
class GridGaps:
    """Times between arrivals from the quantiles of a trace's gaps."""

    grid: Grid

    def draw(self, random: Random) -> float:
        """A gap of mean 1."""
        return self.grid.quantile(random.random()) / self.grid.mean


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens. `kind` is fixed, lognormal or pareto; `shape` is the sigma of the
    logarithm or the exponent of the tail, `most` bounds a Pareto length."""

    kind: str
    mean: float
    shape: float = 0.0
    most: float = MOST_TOKENS
    least: float = 1.0  # of a Pareto length; follows from the others

    def draw(self, random: Random) -> int:
        """One length, at least 1."""
        if self.kind == "fixed":
            return round(self.mean)
        if self.kind == "lognormal":
            middle = math.log(self.mean) - self.shape**2 / 2
            return max(1, round(random.lognormvariate(middle, self.shape)))
        left = 1.0 - random.random() * (1.0 - (self.least / self.most) ** self.shape)
        return max(1, round(self.least / math.pow(left, 1.0 / self.shape)))


@dataclass(frozen=True, slots=True)
class Workload:
    """`rate` is in requests a second; SLOs, where given, are those of every request."""

    rate: float
    num_requests: int
    prompt: Lengths | Grid
    output: Lengths | Grid
    gaps: Gaps | GridGaps = Gaps()
    seed: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


def parse_gaps(text: str) -> Gaps:
    """Read "poisson" or "gamma:CV"; ConfigError says what would be right."""
    if text == "poisson":
        return Gaps()
    kind, _, number = text.partition(":")
    cv = _number(number)
    if kind != "gamma" or cv is None or not 0.0 <= cv <= 100.0:
        raise ConfigError(
            f"arrivals {text!r}: use poisson, or gamma:CV with the gaps' standard deviation over"
            " their mean, such as gamma:3"
        )
    return Gaps(cv)


def parse_lengths(text: str) -> Lengths:
    """Read "1500", "fixed:1500", "lognormal:1500[:SIGMA]" or "pareto:1500[:ALPHA[:MOST]]"."""
    kind, *rest = text.split(":") if ":" in text else ("fixed", text)
    numbers = [_number(part) for part in rest]
    match kind, numbers:
        case "fixed", [float(mean)] if mean >= 1.0:
            return Lengths("fixed", mean)
        case "lognormal", [float(mean), *more] if mean >= 1.0 and len(more) <= 1:
            sigma = more[0] if more else SIGMA
            if sigma is not None and 0.0 <= sigma <= MAX_SIGMA:
                return Lengths("lognormal", mean, sigma)
        case "pareto", [float(mean), *more] if mean >= 1.0 and len(more) <= 2:
            alpha = more[0] if more else ALPHA
            most = more[1] if len(more) == 2 else MOST_TOKENS
            if alpha and most and 0.0 < alpha <= MAX_ALPHA and mean < most:
                return _pareto(mean, alpha, most)
    raise ConfigError(
        f"length {text!r}: use a number of tokens, lognormal:MEAN[:SIGMA], or"
        " pareto:MEAN[:ALPHA[:MOST]], such as lognormal:1500:0.8"
    )


def generate(workload: Workload, max_model_len: int) -> list[Arrival]:
    """The workload's requests, cut to fit the context: outputs first, then prompts."""
    streams = [Random(f"{name} {workload.seed}") for name in ("gaps", "prompts", "outputs")]
    gaps, prompts, outputs = streams
    arrivals, now_s = [], 0.0
    for _ in range(workload.num_requests):
        now_s += workload.gaps.draw(gaps) / workload.rate
        num_output = min(workload.output.draw(outputs), max_model_len // 2)
        num_prompt = min(workload.prompt.draw(prompts), max_model_len - num_output)
        arrivals.append(
            Arrival(
                now_s,
                num_prompt,
                num_output,
                ttft_slo_s=workload.ttft_slo_s,
                tpot_slo_s=workload.tpot_slo_s,
            )
        )
    return arrivals


def read_trace(path: Path, num_requests: int | None = None) -> list[Arrival]:
    """The first requests of a CSV file with the columns arrival_s, input_tokens, output_tokens and
    perhaps more; by time, the first one at 0. ConfigError names the line that cannot be read.

    Where there are prefix_row and prefix_blocks512, a row begins with so many blocks of 512 tokens
    of an earlier row, counted from 0 (-1: of none); `block_ids` then names all its blocks.
    """
    arrivals: list[Arrival] = []
    fresh, num_blocks = itertools.count(), 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = [name for name in TRACE_COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise ConfigError(f"trace {path}: no column {missing[0]!r} in its first line")
            for row in rows:
                if len(arrivals) == num_requests:
                    break
                place = f"trace {path}, line {rows.line_num}"
                arrival = _row(row, place)
                if "prefix_row" in row and "prefix_blocks512" in row:
                    arrival = arrival._replace(block_ids=_blocks(row, arrivals, fresh, place))
                    num_blocks += len(arrival.block_ids)
                    if num_blocks > MAX_TRACE_BLOCKS:
                        raise ConfigError(f"{place}: more than {MAX_TRACE_BLOCKS} blocks so far")
                arrivals.append(arrival)
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace {path} is no CSV file: {error}") from None
    if not arrivals:
        raise ConfigError(f"trace {path} has no requests")
    arrivals.sort(key=lambda arrival: arrival.arrived_s)
    first_s = arrivals[0].arrived_s
    return [one._replace(arrived_s=one.arrived_s - first_s) for one in arrivals]


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests, faster or slower: `rate` a second on average."""
    span_s = arrivals[-1].arrived_s - arrivals[0].arrived_s
    if span_s <= 0.0:
        raise ConfigError("requests that all arrive at one time have no rate to change")
    factor = (len(arrivals) - 1) / span_s / rate
    return [one._replace(arrived_s=one.arrived_s * factor) for one in arrivals]


def _row(row: dict[str, str], place: str) -> Arrival:
    arrived_s, *lengths = (_number(row[name]) for name in TRACE_COLUMNS)
    num_prompt, num_output = lengths
    if arrived_s is None or num_prompt is None or num_output is None:
        raise ConfigError(f"{place}: {', '.join(TRACE_COLUMNS)} must be numbers")
    if arrived_s < 0.0 or not all(1 <= one <= MAX_TRACE_TOKENS for one in (num_prompt, num_output)):
        raise ConfigError(
            f"{place}: a time is 0 or later, a length from 1 token to {MAX_TRACE_TOKENS}"
        )
    return Arrival(arrived_s, int(num_prompt), int(num_output))


def _blocks(
    row: dict[str, str], earlier: Sequence[Arrival], fresh: Iterator[int], place: str
) -> tuple[int, ...]:
    """The blocks that the row shares, and new ones for the rest of its prompt."""
    from_row, num_shared = _number(row["prefix_row"]), _number(row["prefix_blocks512"])
    num_blocks = math.ceil(float(row["input_tokens"]) / BLOCK_TOKENS)
    if from_row is None or num_shared is None or not -1 <= from_row < len(earlier):
        raise ConfigError(f"{place}: prefix_row must be -1 or the number of an earlier row")
    if num_shared < 0:
        raise ConfigError(f"{place}: prefix_blocks512 must be 0 or more")
    shared = earlier[int(from_row)].block_ids[: int(num_shared)] if from_row >= 0 else ()
    shared = shared[:num_blocks]
    return (*shared, *itertools.islice(fresh, num_blocks - len(shared)))


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")  # a short row has no text at its end
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _pareto(mean: float, alpha: float, most: float) -> Lengths:
    """The least length for which the bounded distribution has this mean, by bisection."""
    low, high = mean * 1e-9, mean
    for _ in range(200):
        least = (low + high) / 2
        if _pareto_mean(least, alpha, most) < mean:
            low = least
        else:
            high = least
    return Lengths("pareto", mean, alpha, most, high)


def _pareto_mean(least: float, alpha: float, most: float) -> float:
    """Integral of the density alpha x^-alpha / (least^-alpha - most^-alpha)."""
    if alpha == 1.0:
        integral = math.log(most / least)  # the limit of the other line
    else:
        power = 1.0 - alpha
        integral = alpha / -power * (math.pow(least, power) - math.pow(most, power))
    return integral / (math.pow(least, -alpha) - math.pow(most, -alpha))
