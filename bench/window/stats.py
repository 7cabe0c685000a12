"""Ratios of two arms that served the same requests, and how sure they are.

A run is cut into blocks of consecutive requests; the blocks of all seeds together are what is drawn
again. Neighbours in one queue wait for each other, so single requests would look surer than they
are, and five whole runs are too few to draw from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]  # one value for each request, in order of arrival

BLOCKS_PER_RUN = 4
RESAMPLES = 1000
COVERAGE = 0.95


class Ratio(NamedTuple):
    """Ours over theirs, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def p99(samples: Samples) -> float:
    """The smallest sample that at least 99 % of all do not exceed."""
    rank = int(np.ceil(0.99 * len(samples))) - 1
    return float(np.partition(samples, rank)[rank])


def mean_ratio(ours: Sequence[Samples], theirs: Sequence[Samples]) -> Ratio:
    """Ratio of means. `ours[i]` and `theirs[i]` are the same requests: one run each."""
    a, b = _blocks(ours), _blocks(theirs)
    sums_a = np.array([block.sum(dtype=np.float64) for block in a])
    sums_b = np.array([block.sum(dtype=np.float64) for block in b])
    drawn = _drawn(len(a))
    ratios = sums_a[drawn].sum(axis=1) / sums_b[drawn].sum(axis=1)
    return _interval(float(sums_a.sum() / sums_b.sum()), ratios)


def p99_ratio(ours: Sequence[Samples], theirs: Sequence[Samples]) -> Ratio:
    """Ratio of 99th percentiles of all runs together."""
    a, b = _blocks(ours), _blocks(theirs)
    ratios = [
        p99(np.concatenate([a[i] for i in drawn])) / p99(np.concatenate([b[i] for i in drawn]))
        for drawn in _drawn(len(a)).tolist()
    ]
    return _interval(p99(np.concatenate(a)) / p99(np.concatenate(b)), np.array(ratios))


def pairs_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ratio of the sums of paired values, one pair for each seed: draws whole seeds."""
    a, b = np.asarray(ours), np.asarray(theirs)
    drawn = _drawn(len(a))
    ratios = a[drawn].sum(axis=1) / b[drawn].sum(axis=1)
    return _interval(float(a.sum() / b.sum()), ratios)


def _blocks(runs: Sequence[Samples]) -> list[Samples]:
    return [block for run in runs for block in np.array_split(run, BLOCKS_PER_RUN)]


def _drawn(count: int) -> npt.NDArray[np.int64]:
    """[RESAMPLES, count] indices. The same for every pair of arms: results do not wander."""
    return np.random.default_rng(count).integers(0, count, (RESAMPLES, count))


def _interval(value: float, ratios: npt.NDArray[np.float64]) -> Ratio:
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Ratio(value, float(low), float(high))
