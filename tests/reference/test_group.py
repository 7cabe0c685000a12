"""How the workers of an instance reach each other, as real processes."""

from pathlib import Path

import pytest

from nodeserve.layout import Shape
from tests.reference import ranks, talk


@pytest.mark.parametrize("kind", ["memory", "torch"])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_rows_and_exchanges_arrive_where_they_should(
    kind: str, size: int, tmp_path: Path
) -> None:
    found = ranks.run(Shape(tp=size), tmp_path, talk.collectives, kind, str(tmp_path))
    factor = size * (size + 1) / 2
    for rank, one in enumerate(found):
        assert one["sum"] == [[0.0, factor, 2 * factor], [3 * factor, 4 * factor, 5 * factor]]
        expected = [100.0 * giver + rank for giver in range(size) for _ in range(rank + giver)]
        assert one["taken"] == expected
    assert found[0]["gathered"] == [[rank, 10.0 * rank] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_stages_pass_on_in_order_and_never_wait_to_send(size: int, tmp_path: Path) -> None:
    first, *others = ranks.run(Shape(pp=size), tmp_path, talk.stages)
    assert first == [2.0 * number for number in range(talk.NUM_SENT)]
    assert others == [[]] * (size - 1)


def test_a_stage_that_ended_is_reported(tmp_path: Path) -> None:
    found = ranks.run(Shape(pp=2), tmp_path, talk.left_alone, num_results=1)
    assert "cannot be reached" in found[0]


def test_a_rank_that_ended_is_reported_when_its_time_is_over(tmp_path: Path) -> None:
    found = ranks.run(Shape(tp=2), tmp_path, talk.left_alone, num_results=1, timeout_s=0.3)
    assert "member 1 does not come" in found[0]
