"""Tensor ranks and pipeline stages as real processes: what one worker computes, they compute.

Every shape runs once, with all models in turn. The steps of a model are prompts in chunks, then
decodes of what the single worker's logits say; on a pipeline two are always under way.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodeserve.layout import Shape
from tests.reference import hub, ranks
from tests.reference.parallel_steps import Case, alone, prompts, together
from tests.reference.tiny_models import FAMILIES, SMALL, reference, written

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    **{name: FAMILIES[name] for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3")},
    # Windows that begin in the second stage; heads that do not divide, as SmolLM2's.
    "windowed": replace(FAMILIES["mistral"], first_window_layer=2, num_heads=9),
}
OTHERS = ("mixtral", "qwen2-moe", "qwen3-moe", "opt", "opt-post-norm", "opt-bare")
SHAPES = [
    Shape(tp=2),
    Shape(tp=4),
    Shape(pp=2),
    Shape(tp=2, pp=2),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, list[torch.Tensor]]]:
    """Every model with what one worker makes of it."""
    folder = tmp_path_factory.mktemp("tiny")
    found = {}
    for name, config in MODELS.items():
        checkpoint = written(reference(config), config, folder / name)
        case = Case(checkpoint, torch.float32, prompts(config))
        found[name] = (case, alone(case))
    for name in OTHERS:
        hub.write(name, folder / name)
        checkpoint = hub.checkpoint_in(folder / name)
        case = Case(checkpoint, torch.float32, prompts(checkpoint.config))
        found[name] = (case, alone(case))
    llama = found["llama"][0].checkpoint
    half = Case(llama, torch.bfloat16, prompts(SMALL))
    found["llama in bfloat16"] = (half, alone(half))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_tokens_are_those_of_one_worker(
    shape: Shape, cases: dict[str, tuple[Case, list[torch.Tensor]]], tmp_path: Path
) -> None:
    every = ranks.run(shape, tmp_path, together, [case for case, _ in cases.values()])
    for number, (name, (case, expected)) in enumerate(cases.items()):
        leader, *others = (found[number] for found in every)
        assert not any(logits.numel() for found in others for logits in found)
        for step, (ours, theirs) in enumerate(zip(leader, expected, strict=True)):
            assert difference(ours, theirs) <= allowed(shape, case), (name, step)
            if case.dtype == torch.float32:
                assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist(), (name, step)


def allowed(shape: Shape, case: Case) -> float:
    """Stages change no bit; sums over ranks are rounded elsewhere."""
    if shape.tp == 1:
        return 0.0
    return 1e-4 if case.dtype == torch.float32 else 0.1


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, as a share of the largest logit."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max()) if theirs.numel() else 0.0
