"""Figures of runs, drawn."""

from pathlib import Path

import pytest

from nodeserve.loadgen.bench import Result
from nodeserve.loadgen.figures import draw
from nodeserve.loadgen.measure import measure
from nodeserve.plan.goodput import Slo
from tests.unit.test_loadgen_measure import sample


def result(rate: float, ttft_s: float) -> Result:
    samples = [sample(i, ttft_s * (1 + i % 3)) for i in range(30)]
    report = measure(samples, lambda arrival: Slo(0.2, 0.05), 0.9)
    assert report is not None
    return Result(rate, [one.job.arrival for one in samples], report, samples)


@pytest.mark.slow
def test_every_figure_is_drawn(tmp_path: Path) -> None:
    results = [result(1.0, 0.01), result(2.0, 0.1), result(2.0, 0.1), result(4.0, 0.3)]
    paths = draw(
        results, lambda arrival: Slo(0.2, 0.05), 0.9, 0.95, tmp_path / "new", ("svg", "png")
    )
    assert {path.name for path in paths} == {
        f"{name}.{kind}"
        for name in ("attainment", "slo_scale", "ttft", "tpot", "worst_gap", "e2e")
        for kind in ("svg", "png")
    }
    assert all(path.stat().st_size > 2000 for path in paths)
    legend = (tmp_path / "new" / "slo_scale.svg").read_text()
    assert [legend.count(f"<!-- {rate}/s -->") for rate in (1, 2, 4)] == [1, 1, 1]
    ticks = (tmp_path / "new" / "ttft.svg").read_text()
    assert all(f"<!-- {tick} -->" in ticks for tick in (10, 20, 50, 100, 500)), "plain numbers"
    near = [result(1.0, 0.01)]  # 10 to 30 ms, in an axis of less than a decade
    draw(near, lambda arrival: Slo(0.2, 0.05), 0.9, 0.95, tmp_path / "near", ("svg",))
    ticks = (tmp_path / "near" / "ttft.svg").read_text()
    assert all(f"<!-- {tick} -->" in ticks for tick in (10, 12, 15, 20, 30))
    one = draw(results[:1], lambda arrival: Slo(0.2, 0.05), 0.9, 0.95, tmp_path, ("svg",))
    assert "attainment.svg" not in {path.name for path in one}
