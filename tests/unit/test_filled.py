"""How passes were filled, in sums."""

import pytest

from nodeserve.policy.cost import RankWork
from nodeserve.policy.filled import Filled


def test_balance_is_the_mean_over_the_maximum_of_each_pass() -> None:
    filled = Filled()
    filled.count([RankWork(30), RankWork(60), RankWork(0)], 100, 0.5)
    filled.count([RankWork(50)], 100, 0.25)
    told = filled.stats()
    assert told == {
        **{"num": 2, "seconds": 0.75, "tokens": 140, "room": 400},
        "balance": pytest.approx(0.5 + 1.0),
    }
