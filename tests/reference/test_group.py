"""How the workers of an instance reach each other, as real processes."""

from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from nodeserve.errors import WorkerLost
from nodeserve.layout import Shape
from nodeserve.model.group_host import share_a_gpu
from nodeserve.model.group_memory import MemoryGroup
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


def test_a_member_whose_memory_went_with_it_is_lost() -> None:
    """Its own end says more, and is waited for."""
    store: Any = distributed.HashStore()  # type: ignore[attr-defined]
    store.set("memory", "/proc/self/fd/none")
    with pytest.raises(WorkerLost, match="cannot be reached: .*No such file"):
        MemoryGroup(store, 1, 2, timeout_s=1.0)


@pytest.mark.parametrize(
    ("size", "kind"), [(2, "memory"), (3, "memory"), (2, "host"), (3, "torch")]
)
def test_stages_pass_on_in_order(size: int, kind: str, tmp_path: Path) -> None:
    """What goes back has room: the first stage may have much on its way before it takes any."""
    first, *others = ranks.run(Shape(pp=size), tmp_path, talk.stages, kind, str(tmp_path))
    assert first == [2.0 * number for number in range(talk.NUM_SENT)]
    assert others == [[]] * (size - 1)


@pytest.mark.parametrize(
    ("shape", "words"),
    [(Shape(tp=2), "member 1 does not come"), (Shape(pp=2), "the other end sends nothing")],
)
def test_who_ended_is_reported_when_its_time_is_over(
    shape: Shape, words: str, tmp_path: Path
) -> None:
    found = ranks.run(shape, tmp_path, talk.left_alone, num_results=1, timeout_s=0.3)
    assert "cannot be reached" in found[0] and words in found[0]


def test_stages_that_know_another_shape_are_told(tmp_path: Path) -> None:
    _, second = ranks.run(Shape(pp=2), tmp_path, talk.strangers)
    assert second.endswith("different steps: the other end sends 12 bytes, expected are 16")


def test_members_that_exchange_another_amount_are_told(tmp_path: Path) -> None:
    _, second = ranks.run(Shape(tp=2), tmp_path, talk.disagree, timeout_s=3.0)
    assert second.endswith("different steps: member 0 gives 8 bytes, expected are 16")


def test_workers_that_share_a_gpu_are_found() -> None:
    """NCCL would refuse them; every worker sees the same."""
    shape = Shape(tp=2, pp=2)
    for names, shared in (("abcd", False), ("abca", True)):
        store = distributed.HashStore()  # type: ignore[attr-defined]
        for rank, name in enumerate(names):
            store.set(f"gpu.{rank}", name)  # as each worker does
        for rank, name in enumerate(names):
            assert share_a_gpu(Place.of(shape, rank), store, name) is shared
