"""The device's sampler against the exact distribution, and against the CPU's."""

from typing import Any

import numpy
import pytest
import torch

from nodeserve.model.gpu import sampling
from nodeserve.policy.batching import Sequence
from nodeserve.types import Sampling
from nodeserve.worker.constraints import Constraints
from nodeserve.worker.sampler import sample, uniform
from nodeserve.worker.sampler_gpu import GpuSampler
from tests.reference.gpu.plain import Recorder, Silent
from tests.reference.test_constrained_sampling import FAILS, compiler_of, constrained_requests
from tests.reference.test_sampler import (
    FILTERS,
    VOCAB,
    mixed_requests,
    random_logits,
    reference_probabilities,
    sequence_of,
)


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of this vocabulary in three tiles, the last one not full."""
    monkeypatch.setattr(sampling, "MAX_TILE", 512)


def drawn(
    device: torch.device, logits: torch.Tensor, samplings: list[Sampling], numbers: list[float]
) -> list[int]:
    rows = [
        (one.temperature, one.top_k, one.top_p, one.min_p, number)
        for one, number in zip(samplings, numbers, strict=True)
    ]
    parameters = torch.tensor(rows, dtype=torch.float64, device=device)
    tokens = torch.empty(len(rows), dtype=torch.int32, device=device)
    sampling.choose(logits.clone().to(device), parameters, tokens)
    found: list[int] = tokens.tolist()
    return found


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_choice_is_the_inverse_cdf_of_the_reference(
    device: torch.device, filters: dict[str, Any]
) -> None:
    chosen = Sampling(**filters)
    points = [0.0, 0.37, 0.72, 1 - 2.0**-53]
    logits = random_logits(1, seed=11)
    probabilities = reference_probabilities(logits[0], chosen)
    ends = probabilities.cumsum(-1)
    tokens = drawn(device, logits.expand(len(points), -1), [chosen] * len(points), points)
    for point, token in zip(points, tokens, strict=True):
        assert probabilities[token] > 0, "a token that the filters drop"
        start = ends[token] - probabilities[token]
        assert start - 1e-5 <= point <= ends[token] + 1e-5


def test_the_lowest_weight_keeps_exactly_the_tokens_of_the_reference(device: torch.device) -> None:
    """Points just inside both ends of the first and last kept tokens' shares."""
    for filters in ({"top_k": 3}, {"top_k": 7, "top_p": 0.9}, {"top_p": 0.7}, {"min_p": 0.2}):
        chosen = Sampling(**filters)
        logits = random_logits(1, seed=2, vocab=600)
        probabilities = reference_probabilities(logits[0], chosen)
        kept = probabilities.nonzero().flatten().tolist()
        shares = probabilities[kept].cumsum(0) - probabilities[kept] / 2
        rows = logits.expand(len(kept), -1)
        assert drawn(device, rows, [chosen] * len(kept), shares.tolist()) == kept


def test_tokens_equal_to_the_lowest_kept_one_are_all_kept(device: torch.device) -> None:
    logits = torch.full((8, 700), -5.0)
    logits[:, [3, 100, 520, 699]] = 2.0
    points = [(place + 0.5) / 8 for place in range(8)]
    tokens = drawn(device, logits, [Sampling(top_k=2)] * 8, points)
    assert tokens == [3, 3, 100, 100, 520, 520, 699, 699]


def test_the_most_likely_token_is_the_first_of_the_highest(device: torch.device) -> None:
    logits = random_logits(5)
    logits[1, [1300, 30, 31, 512]] = 99.0
    logits[2, :] = -torch.inf
    logits[2, VOCAB - 1] = -5.0
    logits[3, :] = 0.0
    logits[4, :] = -torch.inf
    tokens = torch.empty(5, dtype=torch.int32, device=device)
    sampling.choose(logits.to(device), None, tokens)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert tokens.tolist()[1:] == [30, VOCAB - 1, 0, 0]


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1e-5}, {"temperature": 100.0}, {"min_p": 1e-30}, {"top_p": 1e-12}],
    ids=str,
)
def test_extreme_settings_choose_a_token(device: torch.device, values: dict[str, Any]) -> None:
    logits = random_logits(2, spread=30.0)
    logits[1, :] = 1.0  # all equal
    first, second = drawn(device, logits, [Sampling(**values)] * 2, [0.3, 0.999])
    assert 0 <= first < VOCAB and 0 <= second < VOCAB
    if values.get("temperature") == 1e-5 or "top_p" in values:
        assert first == int(logits[0].argmax())


def _forget(requests: list[Sequence]) -> None:
    for one in requests:
        one.device_state = None


def test_mixed_requests_get_the_tokens_of_the_cpu_sampler(device: torch.device) -> None:
    """Greedy and drawn, shaped and plain, with logprobs: 16 requests, together and each alone."""
    requests = mixed_requests(16, seed=5)
    requests += [sequence_of(seed=3, logprobs=3), sequence_of(temperature=0.0, logprobs=0)]
    logits = random_logits(len(requests), seed=5)
    wanted = sample(logits.clone(), requests)
    _forget(requests)
    sampler = GpuSampler(device, 32)
    launched = sampler.launch(logits.clone().to(device), requests)
    _wait(device)
    found = launched.result()
    assert found.token_ids == wanted.token_ids == launched.tokens.tolist()
    assert found.logprobs is not None and wanted.logprobs is not None
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        assert (ours.row, ours.top_ids) == (theirs.row, theirs.top_ids)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    for row in range(0, len(requests), 3):
        _forget(requests)
        alone = sampler.launch(logits[row : row + 1].clone().to(device), [requests[row]])
        _wait(device)
        assert alone.result().token_ids == [wanted.token_ids[row]]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def test_places_say_what_the_token_lists_do_not_know_yet(device: torch.device) -> None:
    """A request whose last token is still on the device draws as if it were here."""
    logits = random_logits(1, spread=0.5)
    whole, behind = sequence_of([5, 9], seed=4), sequence_of([5], seed=4)
    sampler = GpuSampler(device, 1)
    tokens = []
    for one, places in ((whole, None), (behind, [2]), (behind, [1])):
        launched = sampler.launch(logits.clone().to(device), [one], places)
        _wait(device)
        tokens.append(launched.result().token_ids[0])
    assert tokens[0] == tokens[1] != tokens[2]
    assert uniform(4, 2) != uniform(4, 1)
    early = sequence_of([5], stops=(7,), temperature=0.0, min_tokens=2, max_tokens=9)
    logits[0, 7] = 50.0
    chosen = []
    for place in (1, 2):
        launched = sampler.launch(logits.clone().to(device), [early], [place])
        _wait(device)
        chosen.append(launched.result().token_ids[0])
    assert chosen[0] != 7 and chosen[1] == 7


def test_a_launch_reads_nothing_on_the_host_and_keeps_its_address(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [*mixed_requests(8, seed=1), sequence_of(logprobs=2)]
    logits = random_logits(len(requests)).to(device)
    sampler = GpuSampler(device, 32)
    if device.type == "cpu":
        monkeypatch.setattr(sampling, "choose_kernel", Silent())
    with Recorder() as recorder:
        launched = sampler.launch(logits, requests)
    waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select")
    assert not [name for name in recorder.names if any(one in name for one in waiting)]
    assert any("index_put_" in name for name in recorder.names)
    assert launched.tokens.data_ptr() == sampler.tokens.data_ptr()


def test_constrained_requests_get_the_tokens_of_the_cpu_sampler(device: torch.device) -> None:
    """Their masks are worked out on the host and applied on the device, which nobody waits for."""
    constraints = Constraints(lambda: compiler_of(VOCAB))
    logits = random_logits(8, seed=6)
    wanted = sample(logits.clone(), constrained_requests(), constraints)
    with Recorder() as recorder:
        sampler = GpuSampler(device, 8, constraints)
        launched = sampler.launch(logits.clone().to(device), constrained_requests())
    assert not [name for name in recorder.names if "_local_scalar_dense" in name]
    _wait(device)
    found = launched.result()
    assert found.token_ids == wanted.token_ids
    assert [one.row for one in found.failed] == [one.row for one in wanted.failed] == [FAILS]


def test_weights_that_are_neighbouring_floats_are_told_apart(device: torch.device) -> None:
    """There the search meets weights in the very middle of its range."""
    if device.type == "cuda":
        pytest.skip("the device's exponential is not exact to the last bit")
    logits = torch.arange(24).mul(-(2.0**-24))
    weights = torch.from_numpy(numpy.exp(logits.numpy()))  # as Triton's interpreter computes them
    points = [(place + 0.5) / 24 for place in range(24)]
    for top_k in (5, 6, 11):
        lowest = weights.sort(descending=True).values[top_k - 1]
        kept = (weights >= lowest).nonzero().flatten().tolist()
        tokens = drawn(device, logits.repeat(24, 1), [Sampling(top_k=top_k)] * 24, points)
        assert sorted(set(tokens)) == kept
