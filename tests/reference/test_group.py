"""How the workers of an instance reach each other, as real processes."""

from pathlib import Path

import pytest
from torch import distributed

from nodeserve.layout import Shape
from nodeserve.model.group_host import share_a_gpu
from nodeserve.shards import Place
from tests.reference import ranks, talk


@pytest.mark.parametrize("kind", ["memory", "host", "torch"])
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


@pytest.mark.parametrize(("size", "by_host"), [(2, False), (3, False), (2, True)])
def test_stages_pass_on_in_order_and_never_wait_to_send(
    size: int, by_host: bool, tmp_path: Path
) -> None:
    first, *others = ranks.run(Shape(pp=size), tmp_path, talk.stages, by_host)
    assert first == [2.0 * number for number in range(talk.NUM_SENT)]
    assert others == [[]] * (size - 1)


def test_a_stage_that_ended_is_reported(tmp_path: Path) -> None:
    found = ranks.run(Shape(pp=2), tmp_path, talk.left_alone, num_results=1)
    assert "cannot be reached" in found[0]


def test_a_rank_that_ended_is_reported_when_its_time_is_over(tmp_path: Path) -> None:
    found = ranks.run(Shape(tp=2), tmp_path, talk.left_alone, num_results=1, timeout_s=0.3)
    assert "member 1 does not come" in found[0]


def test_workers_that_share_a_gpu_are_found() -> None:
    """NCCL would refuse them; every worker sees the same."""
    shape = Shape(tp=2, pp=2)
    for names, shared in (("abcd", False), ("abca", True)):
        store = distributed.HashStore()  # type: ignore[attr-defined]
        for rank, name in enumerate(names):
            store.set(f"gpu.{rank}", name)  # as each worker does
        for rank, name in enumerate(names):
            assert share_a_gpu(Place.of(shape, rank), store, name) is shared
