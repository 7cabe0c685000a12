"""What a verdict simulates beside the search."""

from collections import Counter

import pytest

from nodeserve.plan import verdict as verdicts
from nodeserve.plan.candidates import Candidate
from nodeserve.plan.estimates import Estimate
from nodeserve.plan.goodput import Tally
from nodeserve.plan.planner import Report
from nodeserve.plan.verdict import ABOVE, verdict
from tests.unit.test_planner import question


@pytest.mark.parametrize(("behind", "rates"), [(0.9, [10.0]), (0.5, [10.0, 5.0 * ABOVE])])
def test_no_rate_is_run_twice(
    behind: float, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loser that is near misses first what it misses at the winner's goodput."""
    asked: list[float] = []

    def counted(_: object, __: Candidate, rate: float, *___: object) -> tuple[Tally, Counter[str]]:
        asked.append(rate)
        return Tally(1000, 500), Counter(tpot=500)

    monkeypatch.setattr(verdicts, "count", counted)
    ranked = tuple(
        Estimate(Candidate(layout, 1024), goodput, goodput, None, 99.0, 2)
        for layout, goodput in (("2m", 10.0), ("1p1d", 10.0 * behind))
    )
    said = verdict(Report(question(), ranked, 2, 0, 0, 0, 0, 1000))
    assert asked == rates
    assert said.disaggregate is False and said.misses == {"tpot": 500}
    assert "100% are because tokens are slow" in said.reason
