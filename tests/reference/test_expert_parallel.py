"""Ranks that share experts, as real processes: each has rows of its own, or none, in every step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodeserve.checkpoint import Checkpoint
from nodeserve.config import ModelConfig, MoeConfig
from nodeserve.errors import ModelError
from nodeserve.layout import Shape
from nodeserve.model import families, kv, parallel
from nodeserve.model.backend import make_ops
from nodeserve.model.expert_parts import Exchange, Mlp, Router, Shared, evenly
from nodeserve.model.experts import Exchanged, one_by_one
from nodeserve.model.group import Alone, Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.loader import open_stored
from nodeserve.model.ops_cpu import CpuOps
from nodeserve.policy.expert_placement import place as placed
from nodeserve.shards import Place, Shard, check_fits
from tests.reference import hub, ranks
from tests.reference.steps import BLOCK_SIZE, whole_prompts
from tests.reference.tiny_models import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

NOTHING = StepInputs(
    token_ids=torch.zeros(0, dtype=torch.int32),
    positions=torch.zeros(0, dtype=torch.int32),
    query_starts=torch.zeros(1, dtype=torch.int32),
    context_lens=torch.zeros(0, dtype=torch.int32),
    block_table=torch.zeros(0, 1, dtype=torch.int32),
    logit_rows=torch.zeros(0, dtype=torch.int32),
    num_decodes=0,
    max_query_len=0,
    max_context_len=0,
)


def _prompt(seed: int, length: int) -> list[int]:
    return [(7 * i * i + 13 * seed + i) % 211 for i in range(length)]


def _step(lengths: tuple[int, ...], seed: int, wanted: bool = True) -> StepInputs:
    inputs = whole_prompts([_prompt(seed + i, length) for i, length in enumerate(lengths)])
    return inputs if wanted else replace(inputs, logit_rows=inputs.logit_rows[:0])


# What each rank has in each step: prompts, prompts whose logits nobody wants yet, or nothing.
STEPS: tuple[tuple[StepInputs, ...], ...] = (
    (_step((5, 20), 1), NOTHING, _step((1,), 2), _step((9,), 3, wanted=False)),
    (NOTHING, _step((30,), 4), _step((2, 2, 2), 5), NOTHING),
    (NOTHING, NOTHING, NOTHING, NOTHING),
    (_step((1, 1), 6), _step((3,), 7), NOTHING, _step((40,), 8)),
)


def run_steps(
    place: Place, groups: Groups, checkpoints: list[Checkpoint], dtype: torch.dtype
) -> list[list[torch.Tensor]]:
    """Logits of this rank's own steps, for each model."""
    found = []
    for checkpoint in checkpoints:
        shard = Shard(checkpoint.config, place)
        ops = make_ops(shard.config, dtype, block_size=BLOCK_SIZE)
        layout = kv.layout_of(checkpoint.config, BLOCK_SIZE, dtype, shard)
        pool = torch.zeros(6 * layout.block_bytes, dtype=torch.uint8)
        model = parallel.build(shard, open_stored(checkpoint, dtype), ops, groups)
        cache = ops.cache(layout, pool)
        found.append([model.forward(step[place.ep_rank], cache).clone() for step in STEPS])
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("tiny")
    names = ("mixtral", "qwen2-moe", "qwen3-moe")
    for name in names:
        hub.write(name, folder / name)
    return [hub.checkpoint_in(folder / name) for name in names]


@pytest.mark.slow
def test_rows_that_nobody_wants_logits_of_still_meet_their_experts(
    checkpoints: list[Checkpoint], tmp_path: Path
) -> None:
    """In bfloat16, among them a model of 5 experts on 4 ranks, and ranks with nothing at all."""
    dtype, num_ranks = torch.bfloat16, 4
    together = ranks.run(Shape(ep=num_ranks), tmp_path, run_steps, checkpoints, dtype)
    for rank, found in enumerate(together):
        alone = run_steps(Place(ep_rank=rank), Groups.alone(), checkpoints, dtype)
        for ours, theirs in zip(found, alone, strict=True):
            assert all(map(torch.equal, ours, theirs))
            assert sum(one.numel() for one in ours)


@pytest.mark.slow
def test_tensor_ranks_share_experts_too(checkpoints: list[Checkpoint], tmp_path: Path) -> None:
    together = ranks.run(Shape(tp=2, ep=2), tmp_path, run_steps, checkpoints, torch.float32)
    for rank in range(2):
        alone = run_steps(Place(ep_rank=rank), Groups.alone(), checkpoints, torch.float32)
        for ours, theirs in zip(together[2 * rank], alone, strict=True):
            for mine, wanted in zip(ours, theirs, strict=True):
                assert mine.shape == wanted.shape
                torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


# -- copies of experts ----------------------------------------------------------------------------

CPU = torch.device("cpu")
MOE = MoeConfig(num_experts=6, num_active=2, intermediate_size=24, shared_intermediate_size=8)
LAYER = ModelConfig("mixtral", 8, 32, 24, 1, 1, 1, 16, 64, 1e-5, 1e4, moe=MOE)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mlp(number: int, inner: int) -> Mlp:
    first, second = (_random(inner, 32, seed=10 * number + i) for i in range(2))
    return Mlp(first, second, _random(32, inner, seed=10 * number + 2))


def run_layer(
    place: Place, groups: Groups, held: tuple[tuple[int, ...], ...]
) -> tuple[torch.Tensor, list[int]]:
    """One sparse layer's results for this rank's rows, and the experts that were asked for."""
    ops, asked = CpuOps(LAYER, torch.float32), list[int]()

    def expert(number: int) -> Mlp:
        asked.append(number)
        return _mlp(number, 24)

    exchange = Exchange.between(groups.ep, held, CPU) if place.ep > 1 else None
    shared = Shared(_mlp(9, 8), _random(1, 32, seed=5))
    router = Router(_random(6, 32, seed=4), None)
    op = ops.experts(MOE, 0, router, expert, shared, exchange=exchange)
    x = _random((11, 0, 40)[place.ep_rank], 32, seed=place.ep_rank)
    out = torch.full_like(x, torch.nan)
    op(x, out)
    return out, asked


@pytest.mark.slow
def test_copies_of_hot_experts_change_no_bit(tmp_path: Path) -> None:
    held = placed([90.0, 5.0, 50.0, 5.0, 5.0, 5.0], 3, 3)
    assert sum(map(len, held)) == 9
    together = ranks.run(Shape(ep=3), tmp_path, run_layer, held)
    for rank, (out, asked) in enumerate(together):
        assert tuple(asked) == held[rank]
        alone, everything = run_layer(Place(ep_rank=rank), Groups.alone(), held)
        assert everything == list(range(6))
        assert torch.equal(out, alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_take_the_copies_of_an_expert_in_turn(rank: int) -> None:
    """Slots 0 and 2 hold expert 0, and slot 1 expert 1 alone; ranks begin with another copy."""
    group = Alone()
    group.rank = rank
    held = Exchange.between(group, ((0, 1), (0, 2)), CPU)
    exchanged = Exchanged(one_by_one(CpuOps(LAYER, torch.float32), 0, _never), held, 3, CPU)
    slots = exchanged._slots_of(torch.tensor([[0, 1], [0, 2], [2, 0], [1, 0]]))
    first, second = (0, 2) if rank == 0 else (2, 0)
    assert slots.tolist() == [[first, 1], [second, 3], [3, first], [1, second]]


def _never(place: int) -> Mlp:
    raise AssertionError(place)


def test_experts_are_shared_as_evenly_as_they_can_be() -> None:
    assert evenly(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert sorted(len(held) for held in evenly(5, 4)) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("config", "advice"),
    [(LAYER, "of which this model has 6: use ep6 or less"), (SMALL, "has 0: use tp, or")],
)
def test_more_ranks_than_experts_are_refused(config: ModelConfig, advice: str) -> None:
    with pytest.raises(ModelError, match=advice):
        check_fits(config, Shape(ep=8))
    assert families.shape_of(config, "model.norm.weight") == (config.hidden_size,)
