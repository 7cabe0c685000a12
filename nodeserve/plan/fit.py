"""A cost model from measured passes: policy.cost's formula, fitted to what workers reported.

Errors count as shares of what a pass took, and no coefficient is negative. All passes give one
line; where few tokens take a floor's time instead (weights are read, however little is done with
them), two lines of which a pass takes the longer one are clearly better, and are what is returned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from operator import mul
from statistics import fmean, median
from typing import NamedTuple

from nodeserve.errors import ConfigError
from nodeserve.policy.cost import RankWork, StepCost

LEAST_PASSES = 8  # of a kind
ROUNDS = 3  # of giving passes to the line that says more, and fitting again
TRIMS = 3  # rounds of leaving out what is far off
FAR = 4.0  # usual errors
BETTER = 0.9  # of one line's error that two must be below
GOOD = 0.02  # an error with which one line will do
TO_SPREAD = 1.4826  # a normal distribution's deviation over its median absolute error


class Timed(NamedTuple):
    """One pass of a worker. `group` names the experiment that it was part of."""

    work: RankWork
    seconds: float
    group: str = ""


class Errors(NamedTuple):
    """Relative, of groups of alike passes: their predicted time over the measured one, less 1."""

    mean: float
    worst: float
    num_groups: int


def fit_cost(passes: Sequence[Timed], gap_s: float = 0.0) -> StepCost:
    """Coefficients for these passes, each followed by a gap; ConfigError when they are too few."""
    decodes = [one for one in passes if not one.work.prefill_tokens and one.work.num_decodes]
    prefills = [one for one in passes if one.work.prefill_tokens]
    for kind, found in (("decode", decodes), ("prefill", prefills)):
        if len(found) < LEAST_PASSES:
            raise ConfigError(
                f"only {len(found)} {kind} passes were measured, {LEAST_PASSES} are needed"
            )
    rows = [(_features(one.work), one.seconds) for one in prefills + decodes]
    line = _robust(rows)
    error = _error(rows, [line])
    if error < GOOD:
        return _cost(line, gap_s)
    lines = min(_pairs(rows), key=lambda pair: _error(rows, pair), default=[line])
    if _error(rows, lines) > BETTER * error:
        return _cost(line, gap_s)
    return replace(_cost(lines[0], gap_s), floor=_cost(lines[1], gap_s))


def spread_of(passes: Sequence[Timed], cost: StepCost, gap_s: float = 0.0) -> float:
    """Deviation of single passes around the fit, as a share, far ones left aside."""
    off = [abs(_off(one, cost, gap_s)) for one in passes]
    return min(1.0, TO_SPREAD * median(off)) if off else 0.0


def errors_of(passes: Sequence[Timed], cost: StepCost, gap_s: float = 0.0) -> Errors | None:
    """Of alike passes together; None without any."""
    off = [abs(median(_off(one, cost, gap_s) for one in group)) for group in alike(passes)]
    return Errors(fmean(off), max(off), len(off)) if off else None


def slowdown_of(passes: Sequence[Timed], cost: StepCost, gap_s: float = 0.0) -> float:
    """How many times as long as the formula says these passes take together; 1 without any."""
    told_s = sum(cost.pass_s([one.work]) for one in passes)
    return sum(one.seconds + gap_s for one in passes) / told_s if told_s > 0.0 else 1.0


def alike(passes: Sequence[Timed]) -> list[list[Timed]]:
    """Passes of the same experiment and about the same work, between powers of two, together."""
    groups: dict[tuple[str, int, int], list[Timed]] = {}
    for one in passes:
        sizes = one.work.prefill_tokens.bit_length(), one.work.num_decodes.bit_length()
        groups.setdefault((one.group, *sizes), []).append(one)
    return list(groups.values())


def _off(one: Timed, cost: StepCost, gap_s: float) -> float:
    return cost.pass_s([one.work]) / (one.seconds + gap_s) - 1.0


Line = tuple[float, ...]  # seconds of: a pass with prefill, one without, and what RankWork counts


def _features(work: RankWork) -> Line:
    prefills = 1.0 if work.prefill_tokens else 0.0
    return (prefills, 1.0 - prefills, *map(float, work))


def _cost(line: Line, gap_s: float) -> StepCost:
    prefill_fix_s, decode_fix_s, token_s, attention_s, seq_s, kv_s = line
    return StepCost(prefill_fix_s + gap_s, decode_fix_s + gap_s, token_s, attention_s, seq_s, kv_s)


Row = tuple[Line, float]  # features and seconds


def _pairs(rows: Sequence[Row]) -> Iterator[list[Line]]:
    """Lines for many tokens and for few, for each number of tokens from which they may be many."""
    tokens = [features[2] + features[4] for features, _ in rows]
    for power in range(1, int(max(tokens)).bit_length()):
        few = [number < 1 << power for number in tokens]
        for _ in range(ROUNDS):
            # What few tokens take beside the fixed part is little, and no reason to let it grow.
            floor_rows = [
                ((*features[:2], 0.0, 0.0, *features[4:]), seconds)
                for (features, seconds), one in zip(rows, few, strict=True)
                if one
            ]
            main_rows = [row for row, one in zip(rows, few, strict=True) if not one]
            if min(len(floor_rows), len(main_rows)) < LEAST_PASSES:
                break
            main, floor = _robust(main_rows), _robust(floor_rows)
            yield [main, floor]
            few = [_dot(floor, features) > _dot(main, features) for features, _ in rows]


def _error(rows: Sequence[Row], lines: Sequence[Line]) -> float:
    """Mean relative error of the longest of the lines; what is far off counts as just that far."""
    off = [_miss(row, lines) for row in rows]
    far = FAR * TO_SPREAD * median(off) + 1e-9
    return fmean(min(one, far) for one in off)


def _miss(row: Row, lines: Sequence[Line]) -> float:
    features, seconds = row
    return abs(max(_dot(line, features) for line in lines) / seconds - 1.0)


def _robust(rows: Sequence[Row]) -> Line:
    """Weights of the features, none negative, by least relative squares; rows that are far from the
    fit are left out and it is made again."""
    kept = list(rows)
    weights = _least_squares(kept)
    for _ in range(TRIMS):
        off = [_miss(row, [weights]) for row in kept]
        far = FAR * TO_SPREAD * median(off) + 1e-9
        near = [row for row, one in zip(kept, off, strict=True) if one <= far]
        if len(near) == len(kept) or len(near) < LEAST_PASSES:
            break
        kept = near
        weights = _least_squares(kept)
    return weights


def _least_squares(rows: Sequence[Row]) -> Line:
    """The best of all sets of features whose weights come out positive: they are few."""
    size = len(rows[0][0])
    scales = [max(features[i] for features, _ in rows) or 1.0 for i in range(size)]
    columns = [
        [features[i] / scales[i] / seconds for features, seconds in rows] for i in range(size)
    ]
    products = [[sum(map(mul, one, other)) for other in columns] for one in columns]
    sums = [sum(column) for column in columns]
    best: tuple[float, Line] = (0.0, (0.0,) * size)
    for count in range(1, size + 1):
        for chosen in combinations(range(size), count):
            solved = _solve([[products[i][j] for j in chosen] + [sums[i]] for i in chosen])
            if solved is None or min(solved) < 0.0:
                continue
            # Of squares, what is left of the rows' number: at the best weights they are this.
            loss = -sum(weight * sums[i] for i, weight in zip(chosen, solved, strict=True))
            if loss < best[0]:
                full = dict(zip(chosen, solved, strict=True))
                best = (loss, tuple(full.get(i, 0.0) / scales[i] for i in range(size)))
    return best[1]


def _solve(matrix: list[list[float]]) -> list[float] | None:
    """The normal equations' solution, by elimination, in place; None where the features cannot be
    told apart."""
    size = len(matrix)
    least = [1e-9 * matrix[i][i] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(matrix[r][i]))
        if abs(matrix[pivot][i]) <= least[i]:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(size):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - factor * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] for i in range(size)]


def _dot(weights: Line, features: Line) -> float:
    return float(sum(map(mul, weights, features)))
