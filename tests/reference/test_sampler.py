"""The sampler against a plain, sorting one, against exact probabilities, and against itself."""

import random
from array import array
from typing import Any

import pytest
import torch

from nodeserve.policy.batching import Sequence
from nodeserve.types import Sampling
from nodeserve.wire.messages import unpack_floats, unpack_ids
from nodeserve.worker.penalties import Choice, shape_logits
from nodeserve.worker.sampler import draw, most_likely, sample, uniform

VOCAB = 1500  # not a multiple of the chunk
PROMPT = [3, 5, 5, 8, 1200]


def sequence_of(
    output: list[int] | None = None, stops: tuple[int, ...] = (), **sampling: Any
) -> Sequence:
    made = Sequence(0, array("i", PROMPT + (output or [])), len(PROMPT), Sampling(**sampling))
    made.stop_ids = frozenset(stops)
    return made


def random_logits(
    num_rows: int, seed: int = 0, spread: float = 3.0, vocab: int = VOCAB
) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def reference_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Sort, cut, renormalise: float64, one row, equal logits at a boundary all kept."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    ordered = probabilities.sort(descending=True).values
    if sampling.top_k:
        probabilities = probabilities * (
            probabilities >= ordered[min(sampling.top_k, len(ordered)) - 1]
        )
        probabilities = probabilities / probabilities.sum()
        ordered = probabilities.sort(descending=True).values
    if sampling.top_p < 1.0:
        place = int((ordered.cumsum(-1) < sampling.top_p).sum())
        probabilities = probabilities * (probabilities >= ordered[place])
    probabilities = probabilities * (probabilities >= sampling.min_p * ordered[0])
    return probabilities / probabilities.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 65},
    {"top_k": 700},
    {"top_k": 5000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.99},
    {"top_p": 0.999999, "temperature": 5.0},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.95, "temperature": 3.0},
    {"top_k": 30, "min_p": 0.1, "top_p": 0.9, "temperature": 0.7},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_choice_is_the_inverse_cdf_of_the_reference(filters: dict[str, Any]) -> None:
    """At many points of [0, 1) and in several rows, up to rounding at a boundary."""
    sampling = Sampling(**filters)
    logits = random_logits(4, seed=11)
    points = [(i + 0.5) / 200 for i in range(200)]
    for row in range(4):
        probabilities = reference_probabilities(logits[row], sampling)
        ends = probabilities.cumsum(-1)
        rows = logits[row].expand(len(points), -1)
        with torch.inference_mode():
            tokens = draw(rows.clone(), [sampling] * len(points), points)
        for point, token in zip(points, tokens, strict=True):
            assert probabilities[token] > 0, "a token that the filters drop"
            start = ends[token] - probabilities[token]
            assert start - 1e-5 <= point <= ends[token] + 1e-5


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.5}], ids=str
)
def test_frequencies_are_the_exact_probabilities(filters: dict[str, Any]) -> None:
    """Chi-square over 20,000 outputs of fixed seeds; the bound is the 99.9 % point."""
    sampling, draws = Sampling(**filters), 20_000
    logits = random_logits(1, seed=3, spread=1.5, vocab=12)
    probabilities = reference_probabilities(logits[0], sampling)
    numbers = [uniform(seed, place) for seed in range(200) for place in range(draws // 200)]
    with torch.inference_mode():
        tokens = draw(logits.expand(draws, -1).clone(), [sampling] * draws, numbers)
    counts = torch.bincount(torch.tensor(tokens), minlength=12).double()
    assert not counts[probabilities == 0].any()
    kept = probabilities > 0
    expected = probabilities[kept] * draws
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    degrees = int(kept.sum()) - 1
    assert statistic < degrees + 3.09 * (2 * degrees) ** 0.5 + 4


def test_uniform_numbers_are_spread_and_differ_between_neighbours() -> None:
    numbers = [uniform(seed, place) for seed in range(100) for place in range(100)]
    assert len(set(numbers)) == len(numbers) and all(0 <= one < 1 for one in numbers)
    buckets = torch.bincount((torch.tensor(numbers) * 50).long(), minlength=50).double()
    assert float(((buckets - 200) ** 2 / 200).sum()) < 85  # 99.9 % point of 49 degrees
    pairs = torch.tensor(numbers).view(100, 100)
    assert (
        abs(float(torch.corrcoef(torch.stack([pairs[:-1].flatten(), pairs[1:].flatten()]))[0, 1]))
        < 0.03
    )


def mixed_requests(num_rows: int, seed: int) -> list[Sequence]:
    rng = random.Random(seed)
    made = []
    for row in range(num_rows):
        values: dict[str, Any] = {"seed": row, **rng.choice(FILTERS)}
        values |= rng.choice([{}, {}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}])
        values |= rng.choice([{}, {}, {"logit_bias": {7: 4.0}}, {"min_tokens": 9, "max_tokens": 9}])
        values |= rng.choice([{}, {}, {"temperature": 0.0}])
        output = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 8))]
        made.append(sequence_of(output, stops=(2, 9), **values))
    return made


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("vocab", [VOCAB, 49_152])
def test_a_row_gets_the_same_token_whatever_shares_its_batch(vocab: int, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        logits = random_logits(32, seed=5, vocab=vocab)
        requests = mixed_requests(32, seed=5)
        together = sample(logits.clone(), requests).token_ids
        for row in range(32):
            for one in requests:
                one.device_state = None
            alone = sample(logits[row : row + 1].clone(), [requests[row]]).token_ids
            assert alone == together[row : row + 1]
        some = [30, 3, 4, 17, 9]
        assert sample(logits[some].clone(), [requests[r] for r in some]).token_ids == [
            together[row] for row in some
        ]
    finally:
        torch.set_num_threads(before)


def test_the_weights_that_are_summed_do_not_depend_on_the_batch() -> None:
    """To the bit, not just to the same token: the points lie on the boundaries of the CDF."""
    logits = random_logits(24, seed=8)
    sampling = Sampling(top_p=0.9)
    with torch.inference_mode():
        for row in range(24):
            ends = reference_probabilities(logits[row], sampling).cumsum(-1)
            point = float(ends[int(torch.searchsorted(ends, 0.4))])
            points = [uniform(1, other) for other in range(24)]
            points[row] = point
            together = draw(logits.clone(), [sampling] * 24, points)[row]
            assert draw(logits[row : row + 1].clone(), [sampling], [point]) == [together]


def test_a_seed_is_repeatable_and_a_missing_one_is_drawn_once() -> None:
    logits = random_logits(1, spread=0.1)

    def stream(request: Sequence) -> list[int]:
        tokens = []
        for _ in range(20):
            [token] = sample(logits.clone(), [request]).token_ids
            request.token_ids.append(token)
            tokens.append(token)
        return tokens

    first = stream(sequence_of(seed=1))
    assert first == stream(sequence_of(seed=1)) != stream(sequence_of(seed=2))
    half = sequence_of(first[:10], seed=1)  # as after a preemption, or a handoff
    assert stream(half)[:10] == first[10:]
    assert stream(sequence_of()) != stream(sequence_of())


def reference_shaped(logits: torch.Tensor, request: Sequence) -> torch.Tensor:
    """One row, one token at a time, in the order that vLLM has."""
    sampling, shaped = request.sampling, logits.clone()
    for token, value in sampling.logit_bias.items():
        shaped[token] += value
    if request.num_output < sampling.min_tokens:
        for token in request.stop_ids:
            shaped[token] = -torch.inf
    tokens = request.token_ids.tolist()
    output = tokens[request.num_prompt_tokens :]
    for token in set(tokens):
        factor = sampling.repetition_penalty
        shaped[token] = shaped[token] / factor if shaped[token] > 0 else shaped[token] * factor
    for token in set(output):
        shaped[token] -= sampling.frequency_penalty * output.count(token)
        shaped[token] -= sampling.presence_penalty
    return shaped


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.0},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {5: 3.0, 700: -100.0}, "repetition_penalty": 1.2},
        {"min_tokens": 12, "max_tokens": 12},
        {"min_tokens": 3},
    ],
    ids=str,
)
def test_shaped_logits_equal_the_reference(values: dict[str, Any]) -> None:
    """Step after step, with outputs that repeat themselves, beside rows that shape nothing."""

    request, other = sequence_of([5, 5, 9], stops=(5, 700), **values), sequence_of(temperature=0.0)
    choices = [Choice(other), Choice(request)]
    for token in (9, 9, 44, 5, 1200):
        logits = random_logits(2, seed=token)
        shaped = logits.clone()
        shape_logits(shaped, [other, request], choices, [other.num_output, request.num_output])
        assert torch.equal(shaped[0], logits[0])
        torch.testing.assert_close(shaped[1], reference_shaped(logits[1], request))
        request.token_ids.append(token)


def test_greedy_takes_the_highest_and_temperature_zero_ignores_filters() -> None:
    logits = random_logits(3)
    requests = [sequence_of(temperature=0.0, top_k=3, top_p=0.5) for _ in range(3)]
    assert sample(logits.clone(), requests).token_ids == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_raw_logits_and_only_for_those_who_ask() -> None:
    logits = random_logits(4)
    requests = [
        sequence_of(temperature=0.0),
        sequence_of(temperature=0.0, logprobs=0),
        sequence_of(temperature=0.0, logprobs=3, logit_bias={77: 50.0}),
        sequence_of(seed=4, temperature=2.0, logprobs=20),
    ]
    sampled = sample(logits.clone(), requests)
    assert sampled.token_ids[2] == 77 and sampled.logprobs is not None
    assert [one.row for one in sampled.logprobs] == [1, 2, 3]
    exact = torch.log_softmax(logits.double(), -1)
    for one, count in zip(sampled.logprobs, (0, 3, 20), strict=True):
        row = exact[one.row]
        assert one.logprob == pytest.approx(float(row[sampled.token_ids[one.row]]), abs=1e-5)
        top = row.topk(max(count, 1))
        assert unpack_ids(one.top_ids).tolist() == top.indices.tolist()[:count]
        values = unpack_floats(one.top_logprobs).tolist()
        assert values == pytest.approx(top.values.tolist()[:count], abs=1e-5)


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1e-30}, {"temperature": 100.0}, {"min_p": 1e-30}, {"top_p": 1e-12}],
    ids=str,
)
def test_extreme_settings_choose_a_token(values: dict[str, Any]) -> None:
    logits = random_logits(2, spread=30.0)
    logits[1, :] = 1.0  # all equal
    requests = [sequence_of(seed=1, **values), sequence_of(seed=2, **values)]
    first, second = sample(logits.clone(), requests).token_ids
    assert 0 <= first < VOCAB and 0 <= second < VOCAB
    if values.get("temperature") == 1e-30 or "top_p" in values:
        assert first == int(logits[0].argmax())


def test_tokens_equal_to_the_lowest_kept_one_are_all_kept() -> None:
    logits = torch.full((1, 300), -5.0)
    logits[0, [3, 100, 200, 299]] = 2.0
    sampling = Sampling(top_k=2)
    with torch.inference_mode():
        tokens = {draw(logits.clone(), [sampling], [u / 64])[0] for u in range(64)}
    assert tokens == {3, 100, 200, 299}


@pytest.mark.parametrize("vocab", [VOCAB, 1536])
def test_the_most_likely_token_is_the_first_of_the_highest(vocab: int) -> None:
    logits = random_logits(5, vocab=vocab)
    logits[1, [900, 30, 31]] = 99.0
    logits[2, :] = -torch.inf
    logits[2, vocab - 1] = -5.0
    logits[3, :] = 0.0
    assert most_likely(logits) == [int(row.argmax()) for row in logits]
    assert most_likely(logits)[1:4] == [30, vocab - 1, 0]
