"""Phases of any two shapes, every family: the tokens of one worker, from pages that were copied.

Instances of every shape compute the prompts, each once. Then each decodes what all of them handed
over, itself among them, in steps of all those sequences together.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nodeserve.layout import Shape
from nodeserve.shards import Place
from tests.reference import handed_over, ranks, variants
from tests.reference.handed_over import LENGTHS, Cases, handed, prompts_of
from tests.reference.parallel_steps import CHUNKS, PROMPTS, Case, alone, prompts
from tests.reference.test_parallel import allowed, difference, is_sparse

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = Shape()
DENSE = [ONE, Shape(tp=2), Shape(tp=4), Shape(pp=2), Shape(tp=2, pp=2)]  # 4: twice the KV heads
SPARSE = [*DENSE, Shape(ep=2), Shape(ep=4), Shape(pp=2, ep=2)]
NAMED = {str(shape) or "one": shape for shape in SPARSE}


class Prefilled(NamedTuple):
    """What instances of every shape left behind."""

    folder: Path  # with their pages
    cases: Cases
    expected: dict[str, list[torch.Tensor]]  # logits of each decode on one worker
    given: dict[Shape, list[Any]]  # by each worker: what handed_over.prefill returned


def of_shape(cases: Cases, shape: Shape) -> Cases:
    return {name: (case, shapes) for name, (case, shapes) in cases.items() if shape in shapes}


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory: pytest.TempPathFactory) -> Prefilled:
    folder = tmp_path_factory.mktemp("pages")
    cases = {}
    for name, checkpoint in variants.checkpoints(tmp_path_factory.mktemp("tiny")).items():
        case = Case(checkpoint, torch.float32, prompts(checkpoint.config))
        cases[name] = (case, SPARSE if is_sparse(case) else DENSE)
    expected = {name: alone(case)[len(CHUNKS) :] for name, (case, _) in cases.items()}
    given = {}
    for shape in SPARSE:
        meeting, fitting = tmp_path_factory.mktemp("meeting"), of_shape(cases, shape)
        given[shape] = ranks.run(shape, meeting, handed_over.prefill, fitting, folder)
    return Prefilled(folder, cases, expected, given)


@pytest.mark.parametrize("name", NAMED)
def test_prompts_of_any_shape_have_the_first_tokens_of_one_worker(
    prefilled: Prefilled, name: str
) -> None:
    shape = NAMED[name]
    num_tokens = 0
    for rank, given in enumerate(prefilled.given[shape]):
        place = Place.of(shape, rank)
        if place.is_leader:
            for family, logits in given.items():
                tokens = prefilled.cases[family][0].tokens
                firsts = [tokens[prompt][LENGTHS[prompt]] for prompt in prompts_of(place)]
                assert logits.argmax(-1).tolist() == firsts, (family, name, rank)
                num_tokens += len(firsts)
    assert num_tokens == len(PROMPTS) * len(of_shape(prefilled.cases, shape))


@pytest.mark.parametrize("name", NAMED)
def test_what_any_shape_handed_over_gets_the_tokens_of_one_worker(
    prefilled: Prefilled, name: str, tmp_path: Path
) -> None:
    shape = NAMED[name]
    cases = of_shape(prefilled.cases, shape)
    found = ranks.run(shape, tmp_path, handed_over.decode, cases, prefilled.folder)
    num_pairs = sum(len(sources) for _, sources in cases.values())
    assert check(prefilled, shape, cases, found) == num_pairs * len(PROMPTS)


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", Shape(tp=2)), ("llama", Shape(pp=2)), ("v3", Shape(pp=2))],
    ids=["a layer's heads", "a layer", "a layer's latents"],
)
def test_one_run_from_a_wrong_place_gives_other_tokens(
    prefilled: Prefilled, family: str, shape: Shape, tmp_path: Path
) -> None:
    """Else the tests here could not fail."""
    cases = {family: (prefilled.cases[family][0], [ONE])}
    found = ranks.run(shape, tmp_path, handed_over.decode, cases, prefilled.folder, True)
    with pytest.raises(AssertionError, match="other tokens"):
        check(prefilled, shape, cases, found)


def check(
    prefilled: Prefilled, shape: Shape, cases: Cases, found: list[dict[str, torch.Tensor]]
) -> int:
    """What every worker of the second instance found; how many sequences that were."""
    num_sequences = 0
    for rank, logits in enumerate(found):
        place = Place.of(shape, rank)
        for name, (case, sources) in cases.items():
            if not place.is_leader:
                assert not logits[name].numel()
                continue
            mine = handed(sources, place)
            for one, ours in zip(mine, logits[name].unbind(1), strict=True):
                theirs = torch.stack([step[one.prompt] for step in prefilled.expected[name]])
                same(case, ours, theirs, one.source, shape)
            num_sequences += len(mine)
    return num_sequences


def same(
    case: Case, ours: torch.Tensor, theirs: torch.Tensor, source: Shape, target: Shape
) -> None:
    """A sequence's logits [steps, vocab_size]; one worker found `theirs`."""
    pair = f"{case.checkpoint.path.name}, {source!r} to {target!r}"
    assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist(), f"other tokens: {pair}"
    widest = Shape(tp=max(source.tp, target.tp))
    assert difference(ours, theirs) <= allowed(widest, case), f"other logits: {pair}"
