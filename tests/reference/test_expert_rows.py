"""Rows counted by ranks that share experts, and copies placed by them: real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nodeserve.layout import Shape
from nodeserve.model import experts, kv, parallel, routing
from nodeserve.model.backend import make_ops
from nodeserve.model.group import Alone, Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.loader import open_stored
from nodeserve.model.spread_experts import SpreadExperts
from nodeserve.policy.expert_placement import Placement, imbalance, place
from nodeserve.shards import Place, Shard
from nodeserve.wire.numbers import pack_counts, pack_ids
from nodeserve.worker.device_cuda import expert_rows_of
from tests.fakes.gpu_runtime import FakeRuntime
from tests.reference import hub, ranks
from tests.reference.steps import BLOCK_SIZE
from tests.reference.test_expert_parallel import STEPS, _prompt

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_RANKS = 4


def run_counted(
    place: Place, groups: Groups, folder: Path, held: dict[int, Placement] | None
) -> tuple[list[torch.Tensor], Any]:
    """Logits of this rank's steps, and what it counted in those from the second on."""
    found = hub.checkpoint_in(folder)
    shard, dtype = Shard(found.config, place), torch.bfloat16
    ops = make_ops(shard.config, dtype, block_size=BLOCK_SIZE)
    layout = kv.layout_of(found.config, BLOCK_SIZE, dtype, shard)
    shared = parallel.spread_experts(shard, ops, groups, held)
    model = parallel.build(shard, open_stored(found, dtype), ops, groups, None, shared)
    cache = ops.cache(layout, torch.zeros(6 * layout.block_bytes, dtype=torch.uint8))
    logits = []
    for step in STEPS:
        logits.append(model.forward(step[place.ep_rank], cache).clone())
        if shared is not None and len(logits) == 1:
            shared.forget()
    return logits, None if shared is None else tuple(shared.rows())


def chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], torch.Tensor]:
    """Logits of each rank's steps on one worker, and how often its router chose each expert of each
    sparse layer in all those steps but the first."""
    counts = torch.zeros(2, 8, dtype=torch.int64)
    calls: list[torch.Tensor] = []

    def told(*arguments: Any) -> Any:
        ids, weights = routing.route(*arguments)
        calls.append(ids)
        return ids, weights

    monkeypatch.setattr(experts, "route", told)
    alone = []
    for rank in range(NUM_RANKS):
        calls.clear()
        alone.append(run_counted(Place(ep_rank=rank), Groups.alone(), folder, None)[0])
        layers = [_layers_of(step[rank]) for step in STEPS]
        for layer, ids in zip(sum(layers, []), calls, strict=True):
            counts[layer] += torch.bincount(ids.flatten(), minlength=8)
        for layer, ids in zip(layers[0], calls, strict=False):
            counts[layer] -= torch.bincount(ids.flatten(), minlength=8)
    return alone, counts


def _layers_of(step: StepInputs) -> list[int]:
    """Which of the two sparse layers choose: alone, the last one only where logits are wanted."""
    if not step.token_ids.numel():
        return []
    return [0, 1] if step.logit_rows.numel() else [0]


@pytest.mark.slow
def test_rows_are_the_routers_and_copies_of_hot_experts_even_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a dense layer, ranks with nothing, and rows that nobody wants logits of."""
    hub.write_skewed("qwen3-moe", tmp_path, [_prompt(1, 40)])
    alone, counts = chosen(tmp_path, monkeypatch)
    loads = dict(zip((0, 2), counts.tolist(), strict=True))
    copies = {layer: place(rows, NUM_RANKS, 5) for layer, rows in loads.items()}
    was = {}
    for name, held in (("even", None), ("copies", copies)):
        folder = tmp_path / name
        folder.mkdir()
        together = ranks.run(Shape(ep=NUM_RANKS), folder, run_counted, tmp_path, held)
        for (logits, _), wanted in zip(together, alone, strict=True):
            assert all(map(torch.equal, logits, wanted))
        layers, by_expert, by_rank = zip(*(rows for _, rows in together), strict=True)
        assert [one.tolist() for one in layers] == [[0, 2]] * NUM_RANKS
        assert torch.equal(sum(by_expert), counts)
        assert torch.equal(sum(by_rank).sum(1), counts.sum(1))
        was[name] = imbalance(sum(by_rank).tolist())
    assert was["even"] > 1.4 and was["copies"] < 1.0 + (was["even"] - 1.0) / 2, was


def test_a_gpus_rows_are_read_behind_all_that_was_submitted() -> None:
    runtime = FakeRuntime()
    experts = SpreadExperts(Alone(), 3, runtime.device)
    sent = experts.exchange(4).rows

    def step(*rows: int) -> None:
        sent.add_(torch.tensor(rows))

    runtime.submit(lambda: step(9, 9, 9))  # a warm-up
    runtime.submit(experts.forget)
    runtime.submit(lambda: step(5, 0, 2))
    told = expert_rows_of(runtime, experts)
    assert told == (pack_ids([4]), pack_counts([5, 0, 2]), pack_counts([7]))
    assert expert_rows_of(runtime, None) == (b"", b"", b"")
