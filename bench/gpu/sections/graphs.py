"""A replayed graph gives what the same step gives when it is launched kernel by kernel.

Two workers with the same weights, one with graphs and one without, answer the same prompts in
batches of every captured size and of sizes in between, which run in the next larger graph. A graph
may cut attention into other pieces than an eager step, so sums round differently: log probabilities
agree within a tolerance, and tokens part only where the eager step nearly ties.
"""

import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, check
from bench.gpu.local import LocalWorker
from bench.gpu.shapes import write_config
from nodeserve.config import WorkerSpec
from nodeserve.worker.contract import Device

# Natural log. float32: sums in another order; bfloat16: an activation rounded the other way.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
NUM_TOKENS, NUM_TOP = 5, 20


def run(bed: Bed) -> None:
    with tempfile.TemporaryDirectory(prefix="nodeserve-graphs-") as folder:
        model = str(write_config(bed.small, Path(folder)))
        for dtype in bed.pick(("float32", "bfloat16"), ("float32",)):
            bed.sheet.add(*compare(bed, model, dtype))


def compare(bed: Bed, model: str, dtype: str) -> list[Line]:
    max_num_seqs = bed.pick(64, 2)
    spec = bed.spec(
        model,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=bed.pick(4096, 64),
        max_model_len=256,
        kv_memory=bed.pick(2 << 30, 4 << 20),
    )
    # One after the other: a process has one stream that all of a worker's steps run on.
    replayed = Answers(bed, spec, eager=False)
    captured, sizes = replayed.graph_sizes, sizes_to_try(replayed.graph_sizes, max_num_seqs)
    ours = {count: replayed.to(count) for count in sizes}
    eager = Answers(bed, spec, eager=True)
    theirs = {count: eager.to(count) for count in sizes}
    lines = [
        check(
            f"{dtype}: graphs for every batch up to {max_num_seqs}, none when eager",
            bool(captured) and max(captured) >= max_num_seqs and not eager.graph_sizes,
            f"captured {captured}",
        )
    ]
    worst, problems = 0.0, []
    for count in sizes:
        differences, problem = parted(ours[count], theirs[count], TOLERANCE[dtype])
        worst = max(worst, differences)
        problems += [f"{count} sequences: {problem}"] if problem else []
    lines.append(
        check(
            f"{dtype}: replayed steps give what eager ones give, every size",
            not problems,
            "; ".join(problems[:3]) or f"log probabilities differ by {worst:.2g} at most",
            worst=worst,
        )
    )
    return lines


def sizes_to_try(captured: tuple[int, ...], most: int) -> list[int]:
    """Every captured size and the one below it, which is padded."""
    return sorted({n for size in captured for n in (size, size - 1) if 1 <= n <= most})


class Answers:
    """One loaded worker and what it says to batches of any size."""

    def __init__(self, bed: Bed, spec: WorkerSpec, eager: bool) -> None:
        spec = replace(spec, enforce_eager=eager)
        self._device: Device = bed.load(spec)
        self._worker = LocalWorker(self._device, spec)
        self._vocab = bed.small.vocab_size
        self._next_id = 0

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        sizes: Any = getattr(self._device.executor, "graph_sizes", ())
        return tuple(sizes)

    def to(self, count: int) -> "list[Answer]":
        """Tokens and log probabilities of `count` prompts of different lengths at once."""
        ids = range(self._next_id, self._next_id + count)
        self._next_id += count
        for place, one in enumerate(ids):
            prompt = [(31 * place + 7 * i) % (self._vocab - 1) + 1 for i in range(3 + place % 40)]
            self._worker.submit(one, prompt, max_tokens=NUM_TOKENS, logprobs=NUM_TOP)
        self._worker.run(*ids)
        return [(self._worker.tokens[one], self._worker.logprobs[one]) for one in ids]


Answer = tuple[list[int], list[Any]]  # tokens; [logprob, top ids, top logprobs] of each


def parted(ours: list[Answer], theirs: list[Answer], tolerance: float) -> tuple[float, str]:
    """The largest difference of log probabilities before answers part, and what is not allowed."""
    worst = 0.0
    for (left, left_rows), (right, right_rows) in zip(ours, theirs, strict=True):
        for place, (a, b) in enumerate(zip(left, right, strict=True)):
            if a != b:
                gap = gap_of(right_rows[place], a)
                if not gap <= tolerance:
                    return worst, f"token {place} is {a} and {b}, {gap:.3g} apart"
                break
            difference = abs(left_rows[place][0] - right_rows[place][0])
            if not difference <= tolerance:  # or NaN
                return difference, f"log probabilities differ by {difference:.3g}"
            worst = max(worst, difference)
    return worst, ""


def gap_of(row: Any, token_id: int) -> float:
    """How much less likely a token is than the chosen one; infinite if it is not near the top."""
    chosen, ids, logprobs = row
    count = len(ids) // 4
    top = dict(
        zip(struct.unpack(f"<{count}i", ids), struct.unpack(f"<{count}f", logprobs), strict=True)
    )
    return float(chosen - top[token_id]) if token_id in top else float("inf")
