"""The same tokens on every road: `1m`, `1p1d` with two workers on one GPU, and transformers.

Greedy answers to prompts of 3 to hundreds of tokens, all at once, some longer than a step. The
reference reads each answer once: if each token is the most likely one after those before it, greedy
generation would have given just these. In float32 they agree but for ties of a rounding. In
bfloat16 an answer may leave the reference where that nearly ties, by no more than twice what
bfloat16 moves the reference's own logits.
"""

import importlib.util
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.gpu import ties
from bench.gpu.bed import Bed
from bench.gpu.checkpoints import Reference, write_checkpoint
from bench.gpu.lines import Line, check, unrehearsed
from bench.gpu.serving import all_tokens, served
from nodeserve.checkpoint import EMBEDDED_PACKAGE, resolve
from tests.reference.export import export_folder

LAYOUTS = {"1m": "0", "1p1d": "0,0"}
FLOAT32_TOLERANCE = 1e-3
Tokens = list[list[int]]


def run(bed: Bed) -> None:
    dtypes = bed.pick(("float32", "bfloat16"), ("float32",))
    with tempfile.TemporaryDirectory(prefix="nodeserve-tokens-") as name:
        folder = write_checkpoint(bed.small, Path(name, "llama"))
        prompts = prompts_for(bed)
        roads = [(dtype, layout) for dtype in dtypes for layout in LAYOUTS]
        with ThreadPoolExecutor(len(roads)) as pool:
            found = dict(
                zip(
                    roads,
                    pool.map(lambda road: answers(bed, Path(name), folder, prompts, *road), roads),
                    strict=True,
                )
            )
        exact = Reference(folder, torch.float32, bed.device)
        for dtype in dtypes:
            judge = Judge(bed, folder, prompts, dtype, exact)
            for layout in LAYOUTS:
                bed.sheet.add(judge.against_reference(layout, found[dtype, layout]))
            bed.sheet.add(judge.each_other(found[dtype, "1m"], found[dtype, "1p1d"]))
        del exact
        bed.sheet.add(demo(bed, Path(name)))


def prompts_for(bed: Bed) -> Tokens:
    """Random tokens; the last prompts are longer than a step, so they are prefilled in chunks."""
    draw = torch.Generator().manual_seed(3)
    lengths = bed.pick([*range(3, 200, 17), 300, 512, 700], [3, 16, 17, 40])
    vocab_size = bed.small.vocab_size
    return [torch.randint(1, vocab_size, (n,), generator=draw).tolist() for n in lengths]


def answers(
    bed: Bed, work: Path, model: Path | None, prompts: Tokens, dtype: str, layout: str
) -> Tokens:
    settings: dict[str, Any] = {} if model is None else {"model": model}
    settings |= {
        "device": "cuda",
        "layout": layout,
        "gpus": LAYOUTS[layout],
        "dtype": dtype,
        "max_model_len": bed.pick(1024, 128),
        "max_num_seqs": bed.pick(32, 4),
        "max_num_batched_tokens": bed.pick(256, 32),
        "kv_memory": bed.pick("1GiB", "4MiB"),
    }
    name = f"{dtype}-{layout}-{'demo' if model is None else 'random'}"
    with served(bed, work, name, **settings) as node:
        return all_tokens(node.socket, prompts, bed.pick(48, 8))


class Judge:
    """Of one data type's answers."""

    def __init__(
        self, bed: Bed, folder: Path, prompts: Tokens, dtype: str, exact: Reference
    ) -> None:
        self._prompts = prompts
        self._dtype = dtype
        same = dtype == "float32"
        self._reference = exact if same else Reference(folder, getattr(torch, dtype), bed.device)
        self._exact = exact

    def _logits(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, float]:
        """The reference's logits, and how large a gap between two of them still is a tie."""
        logits = self._reference.logits(prompt, answer)
        if self._reference is self._exact:
            return logits, FLOAT32_TOLERANCE
        moved = (logits - self._exact.logits(prompt, answer)).abs().max()
        return logits, 2 * float(moved)

    def against_reference(self, layout: str, found: Tokens) -> Line:
        name = f"{self._dtype}: {layout} gives the tokens of transformers"
        return compared(name, self._prompts, found, self._logits)

    def each_other(self, one: Tokens, other: Tokens) -> Line:
        """Where they part, the reference must nearly tie between both tokens."""
        apart = 0
        for prompt, left, right in zip(self._prompts, one, other, strict=True):
            place = ties.first_parting(left, right)
            if place is None:
                continue
            apart += 1
            logits, tolerance = self._logits(prompt, left)
            gap = float((logits[place, left[place]] - logits[place, right[place]]).abs())
            if not gap <= tolerance:
                note = f"a prompt of {len(prompt)}: they part at {place}, {gap:.3g} apart"
                return check(f"{self._dtype}: 1p1d gives the tokens of 1m", False, note)
        note = f"{len(one) - apart} of {len(one)} answers are the same to the end"
        return check(f"{self._dtype}: 1p1d gives the tokens of 1m", True, note)


def compared(name: str, prompts: Tokens, found: Tokens, logits_of: Any) -> Line:
    """Every answer agrees with the reference's logits, or leaves them at a near tie."""
    left = []
    for prompt, answer in zip(prompts, found, strict=True):
        logits, tolerance = logits_of(prompt, answer)
        difference = ties.first_difference(answer, logits.tolist())
        if not ties.is_tie(difference, tolerance):
            assert difference is not None
            note = f"a prompt of {len(prompt)}: token {difference.place} is {difference.gap:.3g}"
            return check(name, False, f"{note} below the highest, a tie is {tolerance:.3g}")
        left += [] if difference is None else [difference.gap]
    note = f"{len(found) - len(left)} of {len(found)} answers agree to the end"
    return check(name, True, note, near_ties=left)


def demo(bed: Bed, work: Path) -> Line:
    """The embedded model, whose weights were trained: their ties are rarer than random ones'."""
    name = "float32: the demo model, 1p1d, gives the tokens of transformers"
    if bed.rehearsal:
        return unrehearsed(name)
    if importlib.util.find_spec(EMBEDDED_PACKAGE) is None:
        return check(name, False, f"{EMBEDDED_PACKAGE} is not on this machine (gpu-wheels)")
    folder = work / "demo"
    export_folder(resolve(), folder, torch.float32)
    prompts = [prompt for prompt in prompts_for(bed) if len(prompt) < 200]
    found = answers(bed, work, None, prompts, "float32", "1p1d")
    reference = Reference(folder, torch.float32, bed.device)
    return compared(name, prompts, found, lambda p, a: (reference.logits(p, a), FLOAT32_TOLERANCE))
