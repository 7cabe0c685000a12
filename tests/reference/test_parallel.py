"""Ranks and pipeline stages as real processes: what one worker computes, they compute.

Every shape runs once, with all models in turn. The steps of a model are prompts in chunks, then
decodes of what the single worker's logits say; on a pipeline two are always under way.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodeserve.layout import Shape
from nodeserve.shards import Place
from tests.reference import ranks, variants
from tests.reference.parallel_steps import NUM_DECODES, Case, alone, prompts, together
from tests.reference.tiny_models import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [
    Shape(tp=2),
    Shape(tp=4),
    Shape(pp=2),
    Shape(tp=2, pp=2),
    Shape(ep=2),
    Shape(ep=4),
    Shape(pp=2, ep=2),
]
Cases = dict[str, tuple[Case, list[torch.Tensor]]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Every model with what one worker makes of it."""
    checkpoints = variants.checkpoints(tmp_path_factory.mktemp("tiny"))
    found = [Case(one, torch.float32, prompts(one.config)) for one in checkpoints.values()]
    found.append(Case(checkpoints["llama"], torch.bfloat16, prompts(SMALL)))
    # Other steps before the same decodes.
    found.append(replace(found[0], tokens=prompts(SMALL), chunks=({1: 7, 2: 90}, {0: 61})))
    names = [*checkpoints, "llama in bfloat16", "llama at once"]
    return {name: (case, alone(case)) for name, case in zip(names, found, strict=True)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_tokens_are_those_of_one_worker(
    shape: Shape, cases: Cases, tmp_path: Path
) -> None:
    run = [name for name, (case, _) in cases.items() if shape.ep == 1 or is_sparse(case)]
    every = ranks.run(shape, tmp_path, together, [cases[name][0] for name in run])
    for rank, gives in enumerate(every):
        for name, logits in zip(run, gives, strict=True):
            if Place.of(shape, rank).is_leader:
                check(logits, name, shape, *cases[name])
            else:
                assert not any(one.numel() for one in logits)
    if "llama" in run:
        chunked, at_once = (every[0][run.index(name)] for name in ("llama", "llama at once"))
        assert all(map(torch.equal, chunked[-NUM_DECODES:], at_once[-NUM_DECODES:]))


def is_sparse(case: Case) -> bool:
    return case.checkpoint.config.moe is not None


def check(
    logits: list[torch.Tensor], name: str, shape: Shape, case: Case, expected: list[torch.Tensor]
) -> None:
    for step, (ours, theirs) in enumerate(zip(logits, expected, strict=True)):
        assert difference(ours, theirs) <= allowed(shape, case), (name, step)
        if case.dtype == torch.float32:
            assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist(), (name, step)


def allowed(shape: Shape, case: Case) -> float:
    """Neither stages nor exchanges change a bit; sums over tensor ranks are rounded elsewhere."""
    if shape.tp == 1:
        return 0.0
    return 1e-4 if case.dtype == torch.float32 else 0.1


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, as a share of the largest logit."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max()) if theirs.numel() else 0.0
