"""What a profile is measured with: batches of requests whose passes show one thing each.

Prompts alone, from one token to several chunks, show prefill; batches of sequences that write some
tokens, from one to as many as a step takes and with short and long contexts, show decode. Every
worker gets the same at the same time, since a node that is worth its money has all of them busy,
and they share memory and clocks. Sizes between those are held out: not fitted, only predicted.

Whatever else runs on the machine makes passes longer, never shorter. So all experiments are made
twice, some time apart, and where the two do not agree, again until the two shortest do; longer runs
are dropped. That gives the formula. A node that serves meets all of it: workers that stream weights
beside each other, its own coordinator and clients, neighbours on the host. So a mixture of requests
is served at last, and every pass of it counts.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from math import ceil
from statistics import median
from typing import NamedTuple

from nodeserve.coordinator.dispatch import work_of
from nodeserve.plan.fit import Timed
from nodeserve.profiling.node import Node
from nodeserve.types import Timings
from nodeserve.wire.messages import StepDone

WRITTEN = 12  # tokens of a sequence, from the end of the last prompt on, whose steps are timed
WARM = 2  # first passes of anything, left out
LARGEST = 16  # chunks that the prompts of one experiment may fill
FIT_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HELD_BATCHES = (3, 6, 12, 24, 48, 96, 192)
FIT_PROMPTS = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # in chunks
HELD_PROMPTS = (1 / 16, 3 / 16, 3 / 8, 3 / 4, 3.0)
SHORT, LONG = 16, 1024  # tokens of context
CONTIGUOUS = 0.5  # of a pass: a longer gap after it was a wait
REPEATS = 3
MOST_RUNS = 4  # of an experiment
AGREE = 1.04  # times the shortest run
MIXTURE = (1 / 8, 1 / 2, 1.0, 2.0)  # prompts of the mixture, in chunks
ANSWER = 24  # tokens
AT_ONCE = 4  # clients an instance, each with one request after the other
SERVED = 64  # requests an instance

Tell = Callable[[str], None]


class Experiment(NamedTuple):
    """`batch` requests an instance, at once."""

    name: str
    batch: int
    prompt: int  # tokens
    output: int
    held_out: bool


class Run(NamedTuple):
    """An experiment, made once: its passes, and the gaps between them."""

    timed: list[Timed]
    gaps: list[float]
    transits: list[float]  # of messages to workers with nothing to do, and back
    busy_s: float  # all passes of all workers


class Measured(NamedTuple):
    """Passes to fit and to predict, what lies between passes of a busy worker, and what a message
    takes to an idle one, or back."""

    fit: list[Timed]
    held_out: list[Timed]
    gap_s: float
    transit_s: float  # of a message, one way


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
            most = WRITTEN + LARGEST
            room = min(LARGEST * budget // batch, num_kv_tokens * 3 // 4 // batch - most)
            longest = min(LONG, room, max_model_len - most)
            for prompt in dict.fromkeys((SHORT, longest)):
                if SHORT <= prompt <= longest:
                    # Who was first still writes when the last one's prompt is done.
                    output = WRITTEN + ceil(batch * prompt / budget)
                    name = f"{batch} x {prompt}"
                    found.append(Experiment(name, batch, prompt, output, held_out))
    return found


async def measure_passes(node: Node, num_instances: int, tell: Tell, every: int = 1) -> Measured:
    """All experiments, or every so-manieth, on all instances at once, until their times are
    sure."""
    plan = node.plan
    planned = experiments(
        plan.max_num_batched_tokens, plan.max_num_seqs, plan.max_model_len, node.num_kv_tokens
    )[::every]
    await _send(node, num_instances, Experiment("warm", 2, SHORT, WRITTEN, held_out=False))
    node.heard()
    runs: dict[Experiment, list[Run]] = {one: [] for one in planned}
    for number in range(1, MOST_RUNS + 1):
        unsure = [one for one in planned if not sure(runs[one])]
        for place, experiment in enumerate(unsure, 1):
            tell(f"round {number}, {place} of {len(unsure)}: {experiment.name}")
            timings: list[Timings] = []
            for _ in range(REPEATS if experiment.output == 1 else 1):
                timings += await _send(node, num_instances, experiment)
            steps, _ = node.heard()
            runs[experiment].append(run_of(steps, timings, experiment))
    kept = {one: undisturbed(found) for one, found in runs.items()}
    all_kept = [run for found in kept.values() for run in found]
    gaps = [gap for run in all_kept for gap in run.gaps]
    transits = [transit for run in all_kept for transit in run.transits]

    def passes(held_out: bool) -> list[Timed]:
        chosen = [run for one, found in kept.items() if one.held_out is held_out for run in found]
        return [timed for run in chosen for timed in run.timed]

    gap_s = median(gaps) if gaps else 0.0
    return Measured(passes(False), passes(True), gap_s, median(transits))


def sure(runs: Sequence[Run]) -> bool:
    """Whether the two shortest agree, so that nothing held them up."""
    shortest = sorted(run.busy_s for run in runs)[:2]
    return len(shortest) == 2 and shortest[1] <= AGREE * shortest[0]


def undisturbed(runs: Sequence[Run]) -> list[Run]:
    """Those that agree with the shortest."""
    shortest = min(run.busy_s for run in runs)
    return [run for run in runs if run.busy_s <= AGREE * shortest]


async def measure_service(node: Node, num_instances: int, tell: Tell) -> list[Timed]:
    """Passes of workers that serve requests of several lengths side by side."""
    plan = node.plan
    most = min(plan.max_model_len - ANSWER, node.num_kv_tokens // (2 * AT_ONCE) - ANSWER)
    prompts = [max(1, min(most, round(share * plan.max_num_batched_tokens))) for share in MIXTURE]
    tell("requests of several lengths")
    numbers = iter(range(SERVED * num_instances))

    async def client() -> None:
        for number in numbers:
            await _ask(node, number, prompts[number % len(prompts)], ANSWER)

    await asyncio.gather(*(client() for _ in range(AT_ONCE * num_instances)))
    steps, _ = node.heard()
    worked = [(work_of(step), step.step_s) for _, step in steps]
    return [Timed(work, seconds) for work, seconds in worked if any(work)]


async def measure_handoffs(
    node: Node, tell: Tell
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Copies from a prefill to a decode worker, of prompts of several lengths: to fit, held out."""
    plan = node.plan
    most = min(plan.max_model_len - 4, node.num_kv_tokens // 2)
    sizes = [size for size in (64, 128, 256, 512, 1024, 2048) if size <= most]
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


async def _send(node: Node, num_instances: int, experiment: Experiment) -> list[Timings]:
    """The experiment's requests on every instance, until all have ended."""
    calls: Sequence[Awaitable[Timings]] = [
        _ask(node, number, experiment.prompt, experiment.output)
        for number in range(experiment.batch * num_instances)
    ]
    return await asyncio.gather(*calls)


async def _ask(node: Node, number: int, prompt: int, output: int) -> Timings:
    # Ids that differ, so that no prefix is shared.
    ids = [(number * 31 + place) % 97 + 1 for place in range(prompt)]
    answer = await node.client.generate(ids, max_tokens=output, ignore_eos=True, temperature=0.0)
    return answer.timings


def run_of(
    steps: Sequence[tuple[int, StepDone]], timings: Sequence[Timings], experiment: Experiment
) -> Run:
    """Passes that had work, but for the first decode steps of each worker, the gaps between passes
    that follow each other, and what messages took where each worker had one request."""
    timed: list[Timed] = []
    gaps: list[float] = []
    last: dict[int, StepDone] = {}
    num_decode: dict[int, int] = {}
    for worker, step in steps:
        work = work_of(step)
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
    alone = timings if experiment.batch == 1 else ()
    transits = [(one.transit_s + one.return_s) / 2 for one in alone]
    return Run(timed, gaps, transits, sum(step.step_s for _, step in steps))
