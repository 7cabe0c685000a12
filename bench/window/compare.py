"""What a grid point shows: each arm's measures, and G against the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.window.grid import IMMEDIATE, SOUND, Point
from bench.window.runs import MEASURES, Run
from bench.window.stats import Ratio, mean_ratio, p99, p99_ratio


@dataclass(frozen=True, slots=True)
class Compared:
    """One point of the grid, all seeds together. Keyed by the arms' letters."""

    point: Point
    qps: float
    measures: Mapping[str, Mapping[str, float]]  # by the names in runs.MEASURES
    num_lost: Mapping[str, int]
    best: str  # of the immediate arms, by mean TTFT
    mean: Ratio  # TTFT of G over the best immediate arm's
    p99: Ratio
    against: Mapping[str, Ratio]  # mean TTFT of G over each arm's on the same node

    def to_json(self) -> dict[str, object]:
        """Short: values of an arm in the order of MEASURES, times in ms."""
        return {
            "shape": str(self.point.shape),
            "arrivals": self.point.arrivals,
            "lengths": self.point.lengths,
            "load": self.point.load,
            "qps": round(self.qps, 2),
            "arms": {
                arm: [_short(name, values[name]) for name in MEASURES]
                for arm, values in self.measures.items()
            },
            "lost": sum(self.num_lost.values()),
            "best": self.best,
            "mean_ratio": rounded(self.mean),
            "p99_ratio": rounded(self.p99),
            "against": {arm: rounded(ratio) for arm, ratio in self.against.items()},
        }


def compare(point: Point, qps: float, runs: Mapping[str, Sequence[Run]]) -> Compared:
    """`runs` holds, for each arm, one run per seed, in the same order of seeds."""
    measures = {arm: _measures(of_arm) for arm, of_arm in runs.items()}
    samples = {arm: [run.ttft_s for run in of_arm] for arm, of_arm in runs.items()}
    best = min(IMMEDIATE, key=lambda arm: measures[arm]["mean_s"])
    return Compared(
        point,
        qps,
        measures,
        {arm: sum(run.num_lost for run in of_arm) for arm, of_arm in runs.items()},
        best,
        mean_ratio(samples["G"], samples[best]),
        p99_ratio(samples["G"], samples[best]),
        {arm: mean_ratio(samples["G"], samples[arm]) for arm in SOUND if arm != "G"},
    )


def rounded(ratio: Ratio) -> list[float]:
    return [round(number, 4) for number in ratio]


def _measures(runs: Sequence[Run]) -> dict[str, float]:
    together = np.concatenate([run.ttft_s for run in runs])
    means = {name: float(np.mean([run.measures[name] for run in runs])) for name in MEASURES[2:]}
    # A bound holds for all runs or not at all.
    means["idle_wait_s"] = max(run.measures["idle_wait_s"] for run in runs)
    return {"mean_s": float(together.mean()), "p99_s": p99(together), **means}


def _short(name: str, value: float) -> float:
    return round(1e3 * value, 1) if name.endswith("_s") else round(value, 4)
