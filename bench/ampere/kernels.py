"""How long a forward pass of Llama 3.1 takes on A100, from published times of its kernels.

    pass = layers * (layer + two all-reduces + attention + other) + head

A layer without attention and all-reduces was measured on A100 (microsoft/vidur 7d475133, Llama 3 8B
and 70B, which have the shapes of 3.1). Its attention was not published, and its all-reduces on A100
contradict what others measured: those of a 70B pass would take longer than all of the pass did
(Splitwise, four GPUs). So those, and the head, are aiconfigurator's on H100, longer by what the
GPUs differ in: memory (decode attention, head), 16-bit arithmetic (prefill attention), NVLink
(all-reduces). What steps take beyond their kernels is vLLM's on H100 (`bench.hopper.fit.engine`).
"""

from functools import cache
from pathlib import Path

import numpy as np

from bench.hopper.fit import engine
from bench.hopper.kernels import Model, all_reduce_us, attention_us, linear_us, rows, table_path

H100 = "h100_sxm"
# What is longer on A100 of 80 GB than on H100, both SXM: TB/s, dense 16-bit TFLOPS, GB/s, nominal.
MEMORY, ARITHMETIC, NVLINK = 3.35 / 2.039, 989 / 312, 900 / 600
TABLE = "vidur_layer_times"
NAMES = {"llama-3.1-8b": "Meta-Llama-3-8B", "llama-3.1-70b": "Meta-Llama-3-70B"}


def missing() -> Path | None:
    """The table, if it is not here."""
    path = table_path(TABLE)
    return None if path.exists() else path


def prefill_ms(name: str, model: Model, tp: int, num_tokens: int) -> float:
    """One prompt of so many tokens in one pass; `name` is a key of NAMES."""
    attention = ARITHMETIC * attention_us(H100, "prefill", model, tp, 1, num_tokens)
    return _pass_ms(name, model, tp, num_tokens, 1, attention)


def decode_ms(name: str, model: Model, tp: int, num_seqs: int, context: int) -> float:
    """A step of so many sequences with so much context each."""
    attention = MEMORY * attention_us(H100, "decode", model, tp, num_seqs, context)
    return _pass_ms(name, model, tp, num_seqs, num_seqs, attention)


def _pass_ms(
    name: str, model: Model, tp: int, num_tokens: int, num_heads: int, attention: float
) -> float:
    reductions = 2 * NVLINK * all_reduce_us(H100, tp, num_tokens * model.hidden)
    layer = _layer_us(name, tp, num_tokens) + reductions + attention + engine().other_us[tp]
    head = linear_us(H100, "bfloat16", num_heads, model.vocabulary // tp, model.hidden)
    return (model.layers * layer + MEMORY * head) / 1e3


@cache
def _layers(name: str, tp: int) -> list[tuple[int, float]]:
    """Tokens and us of all that is in a layer but attention, on one of `tp` GPUs."""
    return sorted(
        (int(row["num_tokens"]), 1e3 * (float(row["linear_ms"]) + float(row["other_ms"])))
        for row in rows(TABLE)
        if (row["gpu"], row["model"], row["tp"]) == ("a100", NAMES[name], str(tp))
    )


def _layer_us(name: str, tp: int, num_tokens: int) -> float:
    """On straight lines between the sizes measured; beyond the largest, in proportion."""
    sizes, times = zip(*_layers(name, tp), strict=True)
    if num_tokens > sizes[-1]:
        return float(times[-1] * num_tokens / sizes[-1])
    return float(np.interp(num_tokens, sizes, times))
