"""What runs of some layouts say of others that share a phase with them."""

import pytest

from nodeserve.plan.bounds import Sides
from nodeserve.plan.candidates import Candidate
from nodeserve.plan.phases import PhaseLimits


def limits(sides: dict[str, tuple[float, float]]) -> PhaseLimits:
    """`sides`: of each layout, what its phases can serve on paper."""
    return PhaseLimits(lambda candidate: Sides(*sides[candidate.layout], both=0.0, in_time=1.0))


def allowed(known: PhaseLimits, rate: float, *layouts: str) -> list[str]:
    return [layout for layout in layouts if known.allow(Candidate(layout, 1024), rate)]


def test_the_slower_phase_is_known_by_one_run() -> None:
    known = limits({"2p,1d:tp2": (10.0, 20.0), "1p:tp4,3d": (40.0, 30.0)})
    known.note(Candidate("2p,1d:tp2", 1024), 9.0)
    assert allowed(known, 8.9, "2p,1d:tp4", "1p,1d:tp4") == ["2p,1d:tp4", "1p,1d:tp4"]
    # No better than what serves 9 already: with as many prefill instances, or fewer.
    assert allowed(known, 9.0, "2p,1d:tp4", "1p,1d:tp4", "3p,1d:tp4", "2p:tp2,1d") == [
        "3p,1d:tp4",
        "2p:tp2,1d",
    ]
    known.note(Candidate("1p:tp4,3d", 1024), 25.0)
    assert allowed(known, 25.0, "1p:tp2,3d", "2p:tp2,2d", "1p:tp4,4d") == ["1p:tp4,4d"]


@pytest.mark.parametrize(
    ("layout", "sides"),
    [
        ("3p1d", (10.0, 11.5)),  # about as fast: each may have held the other up
        ("4p4d", (10.0, 20.0)),  # run as 2p2d, which serves less than the whole
        ("1p1d1m", (10.0, 20.0)),
        ("2m", (10.0, 20.0)),
    ],
)
def test_of_these_nothing_is_known(layout: str, sides: tuple[float, float]) -> None:
    known = limits({layout: sides})
    known.note(Candidate(layout, 1024), 5.0)
    assert allowed(known, 100.0, "3p1d", "1p1d", "3p:tp2,1d", "1p3d") == [
        "3p1d",
        "1p1d",
        "3p:tp2,1d",
        "1p3d",
    ]


def test_the_better_of_two_runs_counts() -> None:
    known = limits({"2p,1d:tp2": (10.0, 20.0), "2p,1d:tp4": (10.0, 40.0)})
    known.note(Candidate("2p,1d:tp2", 1024), 8.0)
    known.note(Candidate("2p,1d:tp4", 1024), 9.0)
    known.note(Candidate("2p,1d:tp2", 1024), 7.0)
    assert allowed(known, 8.5, "2p,1d:tp8") == ["2p,1d:tp8"]
    assert not allowed(known, 9.0, "2p,1d:tp8")


def test_runs_that_are_made_together_do_not_settle_each_other() -> None:
    known = limits(
        {
            "2p,1d:tp2": (10.0, 20.0),
            "2p,1d:tp4": (10.0, 11.0),
            "1p,1d:tp4": (5.0, 11.0),
            "3p,1d:tp4": (15.0, 11.0),
            "2p:tp2,1d": (9.0, 9.0),
        }
    )
    order = [
        Candidate(one, 1024)
        for one in ("2p,1d:tp2", "2p,1d:tp4", "1p,1d:tp4", "3p,1d:tp4", "2p:tp2,1d")
    ]
    assert [one.layout for one in known.apart(order, 2)] == ["2p,1d:tp2", "3p,1d:tp4"]
    assert [one.layout for one in known.apart(order[1:], 2)] == ["2p,1d:tp4", "1p,1d:tp4"]
    assert [one.layout for one in known.apart(order, 9)] == ["2p,1d:tp2", "3p,1d:tp4", "2p:tp2,1d"]
