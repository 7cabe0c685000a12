"""The time to plan ahead, from tables of what happened before."""

import pytest

from nodeserve.policy.pacing import (
    LEAST_LEAD_S,
    MARGIN,
    NUM_LAUNCHES,
    NUM_STEPS,
    Pacer,
    size_class,
)

MS = 1e-3


def pacer_with(steps: list[tuple[int, float]], launches: list[float]) -> Pacer:
    pacer = Pacer()
    for num_seqs, seconds in steps:
        pacer.ended(num_seqs, seconds)
    for seconds in launches:
        pacer.launched(seconds)
    return pacer


@pytest.mark.parametrize(
    ("num_seqs", "similar"),
    [(1, 1), (2, 2), (8, 8), (9, 16), (16, 16), (17, 24), (64, 64), (65, 72), (256, 256)],
)
def test_sizes_are_those_that_devices_pad_to(num_seqs: int, similar: int) -> None:
    assert size_class(num_seqs) == similar


@pytest.mark.parametrize(
    ("steps", "num_seqs", "expected_s"),
    [
        ([], 1, 0.0),
        ([(4, 9 * MS)], 4, 9 * MS),
        ([(4, 9 * MS), (4, 8 * MS), (4, 11 * MS)], 4, 8 * MS),  # the shortest
        ([(12, 9 * MS)], 16, 9 * MS),  # similar
        ([(12, 9 * MS)], 100, 9 * MS),  # a smaller one takes no longer
        ([(12, 9 * MS), (40, 10 * MS)], 100, 10 * MS),  # of the smaller ones the nearest
        ([(12, 9 * MS)], 8, 0.0),  # a larger one says nothing
        ([(1, 5 * MS), (12, 9 * MS)], 8, 5 * MS),
        ([(4, MS)] + [(4, 9 * MS)] * NUM_STEPS, 4, 9 * MS),  # long ago
        ([(4, MS)] + [(4, 9 * MS)] * (NUM_STEPS - 1), 4, MS),
    ],
)
def test_what_a_step_is_expected_to_take(
    steps: list[tuple[int, float]], num_seqs: int, expected_s: float
) -> None:
    assert pacer_with(steps, []).expected_s(num_seqs) == expected_s


@pytest.mark.parametrize(
    ("launches", "lead_s"),
    [
        ([], LEAST_LEAD_S),
        ([0.1 * MS], LEAST_LEAD_S),
        ([1 * MS, 3 * MS, 2 * MS], MARGIN * 3 * MS),
        ([9 * MS] + [MS] * NUM_LAUNCHES, MARGIN * MS),  # long ago
        ([9 * MS] + [MS] * (NUM_LAUNCHES - 1), MARGIN * 9 * MS),
    ],
)
def test_the_lead_has_room_for_the_longest_launch(launches: list[float], lead_s: float) -> None:
    assert pacer_with([], launches).lead_s == pytest.approx(lead_s)


@pytest.mark.parametrize(
    ("steps", "launches", "due_s"),
    [
        ([], [], 0.0),  # unknown: at once
        ([(4, 10 * MS)], [], 10 * MS - LEAST_LEAD_S),
        ([(4, 10 * MS)], [2 * MS], 6 * MS),
        ([(4, 0.4 * MS)], [], 0.0),  # shorter than the lead: at once
        ([(4, 3 * MS)], [2 * MS], 0.0),
    ],
)
def test_a_plan_is_due_a_lead_before_the_end(
    steps: list[tuple[int, float]], launches: list[float], due_s: float
) -> None:
    assert pacer_with(steps, launches).due_s(100.0, 4) == pytest.approx(100.0 + due_s, abs=1e-9)
