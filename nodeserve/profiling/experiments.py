"""What a profile is measured with: batches of requests whose passes show one thing each.

Prompts alone, from one token to several chunks, show prefill; batches of sequences that write some
tokens, from one to as many as a step takes and with short and long contexts, show decode. Every
worker gets the same at the same time, since a node that is worth its money has all of them busy,
and they share memory and clocks. Sizes between those are held out: not fitted, only predicted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from nodeserve.plan.fit import Timed
from nodeserve.policy.cost import RankWork
from nodeserve.profiling.node import Node
from nodeserve.wire.messages import StepDone

WRITTEN = 12  # tokens of a sequence whose decode steps are timed
WARM = 2  # first passes of anything, left out
LARGEST = 8  # chunks that the prompts of one experiment may fill
FIT_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HELD_BATCHES = (3, 6, 12, 24, 48, 96, 192)
FIT_PROMPTS = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # in chunks
HELD_PROMPTS = (1 / 16, 3 / 16, 3 / 8, 3 / 4, 3.0)
SHORT, LONG = 16, 1024  # tokens of context
CONTIGUOUS = 0.5  # of a pass: a longer gap after it was a wait
REPEATS = 3

Tell = Callable[[str], None]


class Experiment(NamedTuple):
    """`batch` requests a worker, at once."""

    name: str
    batch: int
    prompt: int  # tokens
    output: int
    held_out: bool


class Measured(NamedTuple):
    """Passes to fit and to predict, what lies between passes of a busy worker, and handoffs as
    (bytes, seconds), of both kinds."""

    fit: list[Timed]
    held_out: list[Timed]
    gap_s: float
    pulls: list[tuple[int, float]]
    held_pulls: list[tuple[int, float]]


def experiments(
    budget: int, max_num_seqs: int, max_model_len: int, num_kv_tokens: int
) -> list[Experiment]:
    """Within what a worker takes; a node serves each of them without putting anybody back."""
    found: list[Experiment] = []
    for held_out, shares in ((False, FIT_PROMPTS), (True, HELD_PROMPTS)):
        for share in shares:
            prompt = max(1, round(share * budget))
            if prompt + 1 <= min(max_model_len, num_kv_tokens):
                found.append(Experiment(f"prompt {prompt}", 1, prompt, 1, held_out))
    for held_out, batches in ((False, FIT_BATCHES), (True, HELD_BATCHES)):
        for batch in batches:
            if batch > max_num_seqs:
                continue
            room = min(LARGEST * budget, num_kv_tokens * 3 // 4) // batch - WRITTEN
            longest = min(LONG, room, max_model_len - WRITTEN)
            for prompt in dict.fromkeys((SHORT, longest)):
                if SHORT <= prompt <= longest:
                    name = f"{batch} x {prompt}"
                    found.append(Experiment(name, batch, prompt, WRITTEN, held_out))
    return found


async def measure_passes(node: Node, num_workers: int, tell: Tell) -> Measured:
    """All experiments, on all workers at once."""
    plan = node.plan
    planned = experiments(
        plan.max_num_batched_tokens, plan.max_num_seqs, plan.max_model_len, node.num_kv_tokens
    )
    fit: list[Timed] = []
    held: list[Timed] = []
    gaps: list[float] = []
    await _send(node, num_workers, Experiment("warm", 2, SHORT, WRITTEN, held_out=False))
    node.heard()
    for number, experiment in enumerate(planned, 1):
        tell(f"{number} of {len(planned)}: {experiment.name}")
        for _ in range(REPEATS if experiment.output == 1 else 1):
            await _send(node, num_workers, experiment)
            steps, _ = node.heard()
            timed, between = timed_passes(steps, experiment)
            (held if experiment.held_out else fit).extend(timed)
            gaps += between
    gaps.sort()
    return Measured(fit, held, gaps[len(gaps) // 2] if gaps else 0.0, [], [])


async def measure_handoffs(
    node: Node, tell: Tell
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Copies from a prefill to a decode worker, of prompts of several lengths: to fit, held out."""
    plan = node.plan
    most = min(plan.max_model_len - 4, node.num_kv_tokens // 2)
    sizes = [size for size in (64, 128, 256, 512, 1024, 2048, 4096) if size <= most]
    fit: list[tuple[int, float]] = []
    held: list[tuple[int, float]] = []
    for size in sizes:
        for prompt, kept in ((size, fit), (size * 3 // 4, held)):
            tell(f"handoff of {prompt} tokens")
            for _ in range(REPEATS + 1):
                await _send(node, 1, Experiment("handoff", 1, prompt, 2, held_out=False))
            _, pulls = node.heard()
            kept += [(one.num_bytes, one.seconds) for one in pulls[1:]]
    return fit, held


async def _send(node: Node, num_workers: int, experiment: Experiment) -> None:
    """The experiment's requests on every worker, until all have ended."""

    async def one(number: int) -> None:
        # Ids that differ, so that no prefix is shared.
        ids = [(number * 31 + place) % 97 + 1 for place in range(experiment.prompt)]
        await node.client.generate(
            ids, max_tokens=experiment.output, ignore_eos=True, temperature=0.0
        )

    calls: Sequence[Awaitable[None]] = [
        one(number) for number in range(experiment.batch * num_workers)
    ]
    await asyncio.gather(*calls)


def timed_passes(
    steps: Sequence[tuple[int, StepDone]], experiment: Experiment
) -> tuple[list[Timed], list[float]]:
    """Passes that had work, but for the first decode steps of each worker, and the gaps between
    passes that follow each other."""
    timed: list[Timed] = []
    gaps: list[float] = []
    last: dict[int, StepDone] = {}
    num_decode: dict[int, int] = {}
    for worker, step in steps:
        work = RankWork(step.num_prefill_tokens, step.attention, step.num_decodes, step.kv_tokens)
        before = last.get(worker)
        last[worker] = step
        if before is not None:
            gap_s = step.began_s - before.began_s - before.step_s
            if 0.0 <= gap_s < CONTIGUOUS * before.step_s:
                gaps.append(gap_s)
        if not work.prefill_tokens:
            num_decode[worker] = num_decode.get(worker, 0) + 1
            if num_decode[worker] <= WARM:
                continue
        if work.prefill_tokens or work.num_decodes:
            timed.append(Timed(work, step.step_s, experiment.name))
    return timed, gaps
