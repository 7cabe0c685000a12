"""A cost model from measured passes: policy.cost's formula, fitted to what workers reported.

Errors count as shares of what a pass took, and no coefficient is negative. Passes without prefill
come first; where two lines, one for small batches and one for large, are clearly better than one,
the larger batches get their own (other kernels, or arithmetic instead of memory as the limit).
Passes with prefill then give the rest.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

from nodeserve.errors import ConfigError
from nodeserve.policy.cost import RankWork, StepCost

LEAST_PASSES = 8  # of a kind
TRIMS = 3  # rounds of leaving out what is far off
FAR = 4.0  # usual errors
BETTER = 0.75  # of one line's error that two must be below
GOOD = 0.01  # an error with which one line will do
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
    small, large, from_seqs = _decode_lines(decodes)
    first = _with_prefill(prefills, small, gap_s)
    if large is None:
        return first
    other = _with_prefill(prefills, large, gap_s)
    other = replace(other, prefill_fix_s=first.prefill_fix_s, token_s=first.token_s)
    other = replace(other, attention_s=first.attention_s)
    return replace(first, large=other, large_seqs=from_seqs)


def spread_of(passes: Sequence[Timed], cost: StepCost, gap_s: float = 0.0) -> float:
    """Deviation of single passes around the fit, as a share, far ones left aside."""
    off = [abs(_off(one, cost, gap_s)) for one in passes]
    return min(1.0, TO_SPREAD * median(off)) if off else 0.0


def errors_of(passes: Sequence[Timed], cost: StepCost, gap_s: float = 0.0) -> Errors | None:
    """Of passes of the same group, batch and prompt tokens together; None without any."""
    groups: dict[tuple[str, int, int], list[Timed]] = {}
    for one in passes:
        groups.setdefault((one.group, one.work.prefill_tokens, one.work.num_decodes), []).append(
            one
        )
    if not groups:
        return None
    off = []
    for group in groups.values():
        measured = median(one.seconds for one in group) + gap_s
        predicted = median(cost.pass_s([one.work]) for one in group)
        off.append(abs(predicted / measured - 1.0))
    return Errors(fmean(off), max(off), len(off))


def _off(one: Timed, cost: StepCost, gap_s: float) -> float:
    return cost.pass_s([one.work]) / (one.seconds + gap_s) - 1.0


Line = tuple[float, float, float]  # seconds of a decode pass, of a sequence, of a context token


def _decode_lines(passes: Sequence[Timed]) -> tuple[Line, Line | None, int]:
    """One line or two, and the batch from which on the second holds."""
    whole, error = _decode_line(passes)
    sizes = sorted({one.work.num_decodes for one in passes})
    best: tuple[float, Line, Line, int] | None = None
    for size in sizes[1:]:
        below = [one for one in passes if one.work.num_decodes < size]
        above = [one for one in passes if one.work.num_decodes >= size]
        if min(len(below), len(above)) < LEAST_PASSES:
            continue
        (small, small_off), (large, large_off) = _decode_line(below), _decode_line(above)
        both = (small_off * len(below) + large_off * len(above)) / len(passes)
        if best is None or both < best[0]:
            best = (both, small, large, size)
    if best is None or error < GOOD or best[0] > BETTER * error:
        return whole, None, 0
    return best[1], best[2], best[3]


def _decode_line(passes: Sequence[Timed]) -> tuple[Line, float]:
    """And its mean relative error."""
    rows = [
        ((1.0, float(one.work.num_decodes), float(one.work.kv_tokens)), one.seconds)
        for one in passes
    ]
    line, error = _robust(rows)
    return (line[0], line[1], line[2]), error


def _with_prefill(passes: Sequence[Timed], decode: Line, gap_s: float) -> StepCost:
    """The terms of prefill, when those of decodes in the same pass are known."""
    fix_s, seq_s, kv_s = decode
    rows = []
    for one in passes:
        own_s = seq_s * one.work.num_decodes + kv_s * one.work.kv_tokens
        features = (1.0, float(one.work.prefill_tokens), one.work.attention)
        # What decodes are said to take is never most of a pass with prompts in it.
        rows.append((features, max(one.seconds - own_s, one.seconds / 2)))
    (prefill_fix_s, token_s, attention_s), _ = _robust(rows)
    return StepCost(prefill_fix_s + gap_s, fix_s + gap_s, token_s, attention_s, seq_s, kv_s)


Row = tuple[tuple[float, ...], float]


def _robust(rows: Sequence[Row]) -> tuple[tuple[float, ...], float]:
    """Weights of the features, none negative, by least relative squares; rows that are far from the
    fit are left out and it is made again. And the mean relative error of the rest."""
    kept = list(rows)
    weights = _least_squares(kept)
    for _ in range(TRIMS):
        off = [abs(_dot(weights, features) / seconds - 1.0) for features, seconds in kept]
        usual = TO_SPREAD * median(off)
        near = [row for row, one in zip(kept, off, strict=True) if one <= FAR * usual + 1e-9]
        if len(near) == len(kept) or len(near) < LEAST_PASSES:
            break
        kept = near
        weights = _least_squares(kept)
    return weights, fmean(
        abs(_dot(weights, features) / seconds - 1.0) for features, seconds in kept
    )


def _least_squares(rows: Sequence[Row]) -> tuple[float, ...]:
    """The best of all sets of features whose weights come out positive: they are few."""
    size = len(rows[0][0])
    scales = [max(features[i] for features, _ in rows) or 1.0 for i in range(size)]
    scaled = [
        [feature / scale / seconds for feature, scale in zip(features, scales, strict=True)]
        for features, seconds in rows
    ]
    best: tuple[float, tuple[float, ...]] = (float(len(rows)), (0.0,) * size)
    for count in range(1, size + 1):
        for chosen in combinations(range(size), count):
            solved = _solve([[row[i] for i in chosen] for row in scaled])
            if solved is None or min(solved) < 0.0:
                continue
            full = [0.0] * size
            for i, weight in zip(chosen, solved, strict=True):
                full[i] = weight
            loss = sum((_dot(full, row) - 1.0) ** 2 for row in scaled)
            if loss < best[0]:
                best = (loss, tuple(w / s for w, s in zip(full, scales, strict=True)))
    return best[1]


def _solve(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """Weights whose products with the rows are nearest to 1, by the normal equations; None where
    the features do not tell them apart."""
    size = len(rows[0])
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(size)] + [sum(row[i] for row in rows)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(matrix[r][i]))
        if abs(matrix[pivot][i]) < 1e-9 * max(abs(matrix[i][i]), 1e-300) or not matrix[pivot][i]:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(size):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - factor * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] for i in range(size)]


def _dot(weights: Sequence[float], features: Sequence[float]) -> float:
    return sum(weight * feature for weight, feature in zip(weights, features, strict=True))
