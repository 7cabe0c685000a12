"""What the paper's authors published beside it, and where it lies.

The files are no part of the repository: NODESERVE_DATA names their folder, else ../shared/data.
"""

import csv
import json
import os
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

DATA = Path(os.environ.get("NODESERVE_DATA", Path(__file__).parents[3] / "shared" / "data"))
Pair = tuple[int, int]  # tokens of a prompt and of its answer


class Measured(NamedTuple):
    """One request of a run on GPUs."""

    arrived_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float
    tpot_s: float


def missing() -> Path | None:
    """The first folder that is needed and not here."""
    needed = ("distserve/lengths", "distserve/measured", "profiles")
    return next((DATA / name for name in needed if not (DATA / name).is_dir()), None)


@cache
def lengths(name: str) -> tuple[Pair, ...]:
    """Of sharegpt, humaneval and longbench."""
    if name == "longbench":
        return tuple(_longbench())
    file = {"sharegpt": "sharegpt_sample_1600", "humaneval": "humaneval_opt_bpe"}[name]
    rows = json.loads((DATA / "distserve" / "lengths" / f"{file}.json").read_text())
    return tuple((prompt, output) for prompt, output in rows["pairs"])


def pairs_of(name: str) -> tuple[Pair, ...]:
    """`name` is of lengths, or PROMPTS+ANSWER: a number of tokens, or the prompts of such a name,
    and answers of that many tokens."""
    prompts, fixed, output = name.partition("+")
    if not fixed:
        return lengths(name)
    known = [int(prompts)] if prompts.isdigit() else [prompt for prompt, _ in lengths(prompts)]
    return tuple((prompt, int(output)) for prompt in known)


def measured(name: str) -> list[Measured]:
    """A run by the name of its file, such as vllm-100-1: requests, requests a second."""
    path = DATA / "distserve" / "measured" / f"{name}.csv"
    with path.open(newline="") as lines:
        return [
            Measured(
                float(row["arrival_s"]),
                int(row["input_tokens"]),
                int(row["output_tokens"]),
                float(row["ttft_ms"]) / 1e3,
                float(row["tpot_ms"]) / 1e3,
            )
            for row in csv.DictReader(lines)
        ]


def _longbench() -> list[Pair]:
    """Made up: its text is not to be had. After the paper's rule, a context longer than the model's
    window is cut to what the answer leaves of 2040, or less at random; with a fifth of contexts
    shorter than that and answers of this spread, the means are the published 1738 and 91 tokens."""
    random = Random("longbench")
    pairs = []
    for _ in range(2000):
        output = min(512, max(1, round(random.lognormvariate(3.8, 1.2))))
        cut = min(2040 - output, random.randint(1900, 2048))
        pairs.append((cut if random.random() < 0.8 else random.randint(100, cut), output))
    return pairs
