"""Profiles against the published measurements that they are fitted to.

The files are no part of the repository: NODESERVE_DATA names their folder, else ../shared/data.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeserve.policy.cost import RankWork
from nodeserve.policy.profile import Profile
from nodeserve.policy.profiles import FAMILIES, PROFILES, profile_named

DATA = Path(os.environ.get("NODESERVE_DATA", Path(__file__).parents[3] / "shared" / "data"))
Row = tuple[RankWork, float]  # a pass of one rank, and its measured seconds


def published(name: str, **values: str) -> list[dict[str, str]]:
    """The rows of a file that have these values."""
    path = DATA / "profiles" / f"{name}.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here: set NODESERVE_DATA")
    with path.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if values.items() <= row.items()]
    assert rows, f"{path} has nothing with {values}"
    return rows


def prefill(lengths: list[int]) -> RankWork:
    return RankWork(sum(lengths), sum(length * length / 2 for length in lengths))


def decode(num_seqs: int, context: float) -> RankWork:
    return RankWork(num_decodes=num_seqs, kv_tokens=round(num_seqs * context))


def errors(profile: Profile, rows: list[Row]) -> list[float]:
    return [abs(profile.cost.pass_s([work]) / seconds - 1) for work, seconds in rows]


LAYERS = 32  # of Llama 3.1 8B


def h100_rows(phase: str) -> Iterator[tuple[int, int, float, dict[int, tuple[float, float]]]]:
    """Batch size, tokens of each, attention us of a layer; layer us and head us by tokens."""
    layers = {
        int(row["num_tokens"]): (
            float(row["non_attention_layer_us"]),
            float(row["embed_norm_head_us"]),
        )
        for row in published("llmservingsim_h100_layers", model="Llama-3.1-8B", tp="1")
    }
    shape = {"system": "h100_sxm", "phase": phase, "num_heads": "32", "kv_heads": "8"}
    for row in published("aic_attention_h100_h200", **shape):
        yield int(row["batch_size"]), int(row["tokens"]), float(row["us"]), layers


def test_llama_8b_prefills_as_published() -> None:
    """The head computes one token of each prompt. A prompt of several chunks is compared as a
    whole: its attention was measured in one piece, layers up to one chunk."""
    profile = profile_named("llama-3.1-8b-h100")
    chunk, found = profile.max_num_batched_tokens, []
    for num_seqs, length, attention_us, layers in h100_rows("prefill"):
        num_tokens = num_seqs * length
        if num_tokens > chunk and num_seqs > 1:
            continue
        num_passes = max(1, num_tokens // chunk)
        layer_us, head_us = layers[num_tokens // num_passes][0], layers[num_seqs][1]
        seconds = 1e-6 * (num_passes * (LAYERS * layer_us + head_us) + LAYERS * attention_us)
        ours = (num_passes - 1) * profile.cost.prefill_fix_s
        ours += profile.cost.pass_s([prefill([length] * num_seqs)])
        found.append(abs(ours / seconds - 1))
    assert len(found) == 12 and max(found) < 0.08


def test_llama_8b_decodes_as_published() -> None:
    rows = [
        (
            decode(num_seqs, context + 1),
            1e-6 * (LAYERS * (layers[num_seqs][0] + attention_us) + layers[num_seqs][1]),
        )
        for num_seqs, context, attention_us, layers in h100_rows("decode")
    ]
    assert len(rows) > 40
    assert max(errors(profile_named("llama-3.1-8b-h100"), rows)) < 0.06


def test_opt_13b_is_distserves_own_model() -> None:
    profile = profile_named("opt-13b-a100")
    [fit] = published("distserve_a100_fits", engine="distserve", model="facebook/opt-13b", tp="1")
    corrected = 1.1  # by their hand, after the paper: not in the profile
    a, b, c = (1e-3 / corrected * float(fit[f"prefill_{name}"]) for name in "abc")
    launch, token = 2e-3, 1e-7  # that their simulator adds for an engine that runs
    a, b = a + launch, b + token
    rows = [
        (prefill(lengths), a + b * sum(lengths) + c * sum(length**2 for length in lengths))
        for lengths in ([1], [512], [2048], [100, 400, 700])
    ]
    threshold = int(fit["batch_threshold"])
    for part, batches in ("small", (1, 40, threshold - 1)), ("large", (threshold, 200)):
        a, b, c = (1e-3 * float(fit[f"dec_{part}_{name}"]) for name in "abc")
        a, b = a + launch, b + token
        rows += [
            (decode(num_seqs, context), a + b * num_seqs * context + c * num_seqs)
            for num_seqs in batches
            for context in (10, 600, 2000)
        ]
    assert max(errors(profile, rows)) < 1e-5
    [capacity] = published("distserve_kv_capacity", model="facebook/opt-13b", tp="1", pp="1")
    assert profile.num_kv_tokens == int(capacity["max_num_tokens"])


def splitwise() -> list[dict[str, str]]:
    return published(
        "splitwise_step_times",
        model="llama2-70b",
        hardware="h100-80gb",
        tensor_parallel="8",
        token_size="128",
    )


def test_llama_70b_prefills_as_published() -> None:
    profile = profile_named("llama-2-70b-tp8-h100")
    rows = [
        (prefill([int(row["prompt_size"])] * int(row["batch_size"])), float(row["prompt_ms"]) / 1e3)
        for row in splitwise()
    ]
    rows = [row for row in rows if row[0].prefill_tokens <= profile.max_num_batched_tokens]
    assert len(rows) == 7 and max(errors(profile, rows)) < 0.17


def test_llama_70b_decodes_as_published() -> None:
    """A token step's mean context: the prompt and half of the 128 tokens."""
    rows = [
        (
            decode(int(row["batch_size"]), int(row["prompt_size"]) + 64),
            float(row["token_ms"]) / 1e3,
        )
        for row in splitwise()
    ]
    assert len(rows) == 13 and max(errors(profile_named("llama-2-70b-tp8-h100"), rows)) < 0.06


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_profile_holds_together(profile: Profile) -> None:
    assert profile.max_num_seqs <= profile.max_num_batched_tokens
    assert profile.max_model_len < profile.num_kv_tokens
    assert 0.0 <= profile.noise < 0.2 and profile.source
    light, heavy = decode(1, 100), decode(profile.max_num_seqs, 1000)
    assert 0.0 < profile.cost.pass_s([light]) < profile.cost.pass_s([heavy]) < 1.0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_holds_together(name: str) -> None:
    """Of every shape passes take time, memory holds a request for each stage, and more GPUs do
    not hold less."""
    shapes = FAMILIES[name].shapes
    for (tp, pp), profile in shapes.items():
        assert (profile.num_stages, profile.num_gpus) == (pp, tp * pp)
        assert profile.num_kv_tokens // pp > profile.max_model_len
        step = profile.cost.pass_s([decode(8, 500)])
        assert 0.001 < step < profile.cost.pass_s([decode(200, 500)])
        assert profile.cost.pass_s([prefill([64])]) < profile.cost.pass_s([prefill([2000])])
        if (tp, 2 * pp) in shapes:
            assert shapes[tp, 2 * pp].num_kv_tokens > profile.num_kv_tokens
    for shape, profile in FAMILIES[name].ranks.items():
        assert FAMILIES[name].of(shape) is profile


@pytest.mark.parametrize("model", ["opt-13b", "opt-66b", "opt-175b"])
def test_memory_of_opt_is_distserves_count(model: str) -> None:
    rows = {
        (int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"])
        for row in published("distserve_kv_capacity", model=f"facebook/{model}")
    }
    found = 0
    for shape, profile in FAMILIES[f"{model}-a100"].shapes.items():
        if shape in rows:
            assert profile.num_kv_tokens == pytest.approx(rows[shape], rel=1e-3)
            found += 1
    assert found >= 5
