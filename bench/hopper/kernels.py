"""How long a forward pass takes on H100 and H200, from published times of its kernels.

    pass = layers * (four linears + two all-reduces + attention + other) + head

Linears, attention and collectives are aiconfigurator's tables (ai-dynamo/aiconfigurator 095f58a5).
Shapes between its shapes are interpolated by their weights, batches between its batches by their
tokens; attention is fitted as launch + work + sequences, for 8 and for 1 key-value head, and
interpolated between. What the tables lack (norms, activations, quantisation, waiting for each
other) is the two numbers of Engine.
"""

import csv
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from bench.distserve.data import DATA

HEAD_DIM, KV_HEADS = 128, 8


class Model(NamedTuple):
    """All have 8 key-value heads of 128."""

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int
    parameters: float


MODELS = {
    "llama-3.1-8b": Model(32, 4096, 32, 14336, 128256, 8.03e9),
    "llama-3.1-70b": Model(80, 8192, 64, 28672, 128256, 70.6e9),
    "qwen3-32b": Model(64, 5120, 64, 25600, 151936, 32.8e9),
}


class Engine(NamedTuple):
    """`other_us`: of a layer, by the number of GPUs; `prefill_factor`: on what the tables say of
    prefills, whose element-wise kernels move much memory."""

    other_us: dict[int, float]
    prefill_factor: float


def rows(name: str) -> list[dict[str, str]]:
    with table_path(name).open(newline="") as lines:
        return list(csv.DictReader(lines))


def missing() -> Path | None:
    """The first table that is needed and not here."""
    names = ("aic_gemm_h100_h200", "aic_attention_h100_h200", "aic_collectives_h100_h200")
    return next((path for path in map(table_path, names) if not path.exists()), None)


def prefill_ms(
    system: str, precision: str, model: Model, tp: int, num_tokens: int, engine: Engine
) -> float:
    """One prompt of so many tokens in one pass."""
    attention = attention_us(system, "prefill", model, tp, 1, num_tokens)
    us = _pass_us(system, precision, model, tp, num_tokens, 1, attention)
    return (engine.prefill_factor * us + model.layers * engine.other_us[tp]) / 1e3


def decode_ms(
    system: str, precision: str, model: Model, tp: int, num_seqs: int, context: int, engine: Engine
) -> float:
    """A step of so many sequences with so much context each."""
    attention = attention_us(system, "decode", model, tp, num_seqs, context)
    us = _pass_us(system, precision, model, tp, num_seqs, num_seqs, attention)
    return (us + model.layers * engine.other_us[tp]) / 1e3


def table_path(name: str) -> Path:
    return DATA / "profiles" / f"{name}.csv"


def _pass_us(
    system: str,
    precision: str,
    model: Model,
    tp: int,
    num_tokens: int,
    num_heads: int,
    attention: float,
) -> float:
    width = HEAD_DIM * model.heads
    linears = (
        ((width + 2 * HEAD_DIM * KV_HEADS) // tp, model.hidden),
        (model.hidden, width // tp),
        (2 * model.inner // tp, model.hidden),
        (model.hidden, model.inner // tp),
    )
    layer = sum(linear_us(system, precision, num_tokens, n, k) for n, k in linears)
    layer += 2 * all_reduce_us(system, tp, num_tokens * model.hidden) + attention
    head = linear_us(system, "bfloat16", num_heads, model.vocabulary // tp, model.hidden)
    return model.layers * layer + head


@cache
def _linears(system: str, precision: str) -> dict[int, list[tuple[int, float]]]:
    """By tokens: pairs of weights and mean us of the shapes that have so many."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in rows("aic_gemm_h100_h200"):
        if (row["system"], row["gemm_dtype"]) == (system, precision):
            weights = int(row["n"]) * int(row["k"])
            found.setdefault(int(row["m"]), {}).setdefault(weights, []).append(float(row["us"]))
    return {
        tokens: sorted((weights, fmean(times)) for weights, times in shapes.items())
        for tokens, shapes in found.items()
    }


def linear_us(system: str, precision: str, num_tokens: int, n: int, k: int) -> float:
    table = _linears(system, precision)
    sizes = sorted(table)
    times = [_by_weights(table[size], n * k) for size in sizes]
    if num_tokens > sizes[-1]:
        return times[-1] * num_tokens / sizes[-1]
    return float(np.interp(num_tokens, sizes, times))


def _by_weights(pairs: Sequence[tuple[int, float]], weights: int) -> float:
    """Beyond the largest shape on the line from the one of half its weights."""
    (half, half_us), (largest, us) = pairs[-2:]
    if weights > largest:
        return us + (us - half_us) * (weights - largest) / (largest - half)
    return _between(weights, pairs)


def _between(x: float, pairs: Sequence[tuple[float, float]]) -> float:
    """On straight lines between points in order."""
    return float(np.interp(x, [x for x, _ in pairs], [y for _, y in pairs]))


@cache
def _reductions(system: str, num_gpus: int) -> dict[str, list[tuple[float, float]]]:
    """By implementation: logarithms of 16-bit elements and of us."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows("aic_collectives_h100_h200"):
        if (row["system"], row["op"], row["num_gpus"]) == (system, "all_reduce", str(num_gpus)):
            pair = math.log(int(row["message_size"])), math.log(float(row["us"]))
            found.setdefault(row["impl"], []).append(pair)
    return {name: sorted(pairs) for name, pairs in found.items() if "eager" not in name}


def all_reduce_us(system: str, num_gpus: int, elements: int) -> float:
    """By the faster implementation of those measured at this size."""
    if num_gpus == 1:
        return 0.0
    size, times = math.log(elements), []
    for pairs in _reductions(system, num_gpus).values():
        if size <= pairs[-1][0]:
            times.append(math.exp(_between(size, pairs)))
    if times:
        return min(times)
    last, us = max(pairs[-1] for pairs in _reductions(system, num_gpus).values())
    return math.exp(us + size - last)


@cache
def _attention_terms(system: str, phase: str, heads: int) -> tuple[float, float, float]:
    """us = these * (1, work, sequences or tokens), by least relative squares, none negative."""
    found = [
        (_attention_work(phase, int(row["batch_size"]), int(row["tokens"])), float(row["us"]))
        for row in rows("aic_attention_h100_h200")
        if (row["system"], row["phase"], row["num_heads"]) == (system, phase, str(heads))
    ]
    terms = nonnegative_fit([work for work, _ in found], [us for _, us in found])
    return terms[0], terms[1], terms[2]


def _attention_work(phase: str, num_seqs: int, num_tokens: int) -> tuple[float, float, float]:
    if phase == "decode":
        return 1.0, num_seqs * num_tokens, num_seqs
    return 1.0, num_seqs * num_tokens**2, num_seqs * num_tokens


def attention_us(
    system: str, phase: str, model: Model, tp: int, num_seqs: int, num_tokens: int
) -> float:
    work = _attention_work(phase, num_seqs, num_tokens)
    many, one = (
        sum(map(float.__mul__, _attention_terms(system, phase, heads), map(float, work)))
        for heads in (model.heads, KV_HEADS)
    )
    share = (max(1, KV_HEADS // tp) - 1) / (KV_HEADS - 1)
    return one + (many - one) * share


def nonnegative_fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Terms of least relative squares; one that would be negative is 0, the rest fitted again."""
    matrix = np.asarray(features, dtype=float) / np.asarray(values, dtype=float)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        part = matrix[:, used]
        scale = np.abs(part).max(axis=0)
        found = np.linalg.lstsq(part / scale, np.ones(len(matrix)), rcond=None)[0] / scale
        if (found >= 0.0).all():
            break
        del used[int(found.argmin())]
    terms = [0.0] * matrix.shape[1]
    for place, term in zip(used, found, strict=True):
        terms[place] = float(term)
    return terms
