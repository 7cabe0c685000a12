"""A worker is killed in the middle of handoffs; the other one lives on and says what it must.

Two worker processes and no coordinator, so that the moment is ours: several large prompts are
pulled at once, and right behind the requests for them one worker gets SIGKILL. Then a node with two
decode workers, one of which is killed: all streams go on, with no token missing or repeated.
"""

import asyncio
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, check
from bench.gpu.serving import Answer, Node, all_tokens, ask, served, stats_of
from bench.gpu.shapes import write_config
from nodeserve.config import ModelConfig, WorkerSpec
from nodeserve.wire.messages import (
    Cancel,
    Dropped,
    PagesAttached,
    RequestFailed,
)
from tests.fakes.harness import WorkerProcess, started

START_S = 90.0
NUM_PULLS = 6
# Much KV and few weights: a prompt of 4k tokens is 1 GiB of float32 pages.
WIDE = ModelConfig("llama", 8192, 512, 512, 32, 32, 8, 128, 16384, 1e-5, 1e4)


def run(bed: Bed) -> None:
    bed.hurry()
    with tempfile.TemporaryDirectory(prefix="nodeserve-kill-") as name:
        folder = Path(name)
        model = str(write_config(bed.pick(WIDE, bed.small), folder / "wide"))
        for victim in ("source", "target"):
            with started(
                *specs(bed, model), command=bed.worker_command, deadline_s=START_S
            ) as pair:
                bed.sheet.add(
                    *(source_dies(bed, *pair) if victim == "source" else target_dies(bed, *pair))
                )
        bed.sheet.add(node_goes_on(bed, folder))


def specs(bed: Bed, model: str) -> list[WorkerSpec]:
    num_tokens = bed.pick(4096, 64)
    spec = bed.spec(
        model,
        role="prefill",
        dtype="float32",  # so that tokens can be compared with no thought of ties
        max_model_len=num_tokens + 256,
        max_num_seqs=16,
        max_num_batched_tokens=bed.pick(4096, 64),
        kv_memory=bed.pick(12 << 30, 2 << 20),
        gpu_share=2,
    )
    return [spec, replace(spec, role="decode", index=1)]


def prompts_for(bed: Bed) -> list[list[int]]:
    vocab_size, num_tokens = bed.small.vocab_size, bed.pick(4000, 60)
    return [
        [1 + (131 * number + 17 * place) % (vocab_size - 1) for place in range(num_tokens)]
        for number in range(NUM_PULLS)
    ]


def pin(source: WorkerProcess, prompts: list[list[int]]) -> None:
    """All prompts prefilled and waiting to be pulled."""
    for number, prompt in enumerate(prompts):
        source.prefill(number, prompt, handoff=True, max_tokens=8)
    source.until(lambda: all(number in source.pinned for number in range(len(prompts))))


def pull_all(source: WorkerProcess, target: WorkerProcess, prompts: list[list[int]]) -> None:
    """Asked for all at once: the copies run, or wait for each other, when this returns."""
    target.attach(source)
    target.expect(PagesAttached)
    for number, prompt in enumerate(prompts):
        target.pull(source, number, prompt, max_tokens=8)


def source_dies(bed: Bed, source: WorkerProcess, target: WorkerProcess) -> list[Line]:
    prompts = prompts_for(bed)
    pin(source, prompts)
    pull_all(source, target, prompts)
    source.process.kill()
    source.process.wait()
    numbers = set(range(NUM_PULLS))

    def failed() -> set[int]:
        return {m.request_id for m in target.said if isinstance(m, RequestFailed)}

    target.until(lambda: numbers <= {*target.finished, *failed()})
    finished = numbers & set(target.finished)
    note = f"{len(finished)} landed and finished, {len(failed())} failed by name"
    # A request without an end runs into the deadline above; one with two is found here.
    passed = len(finished) + len(failed()) == NUM_PULLS
    first = check("the source is killed during pulls: each request ends, once", passed, note)
    right, problem = serves_on(target, prompts, finished)
    second = check("it serves on, and what had landed has the same tokens", right, problem)
    return [first, second]


def serves_on(
    worker: WorkerProcess, prompts: list[list[int]], landed: set[int]
) -> tuple[bool, str]:
    """The survivor computes the same prompts by itself; what had landed must be the same."""
    for number, prompt in enumerate(prompts):
        worker.prefill(1000 + number, prompt, max_tokens=8)
    worker.finish(*(1000 + number for number in range(len(prompts))))
    # A pulled request's first token came from the source: the stream here begins behind it.
    wrong = [n for n in sorted(landed) if worker.streams[n] != worker.streams[1000 + n][1:]]
    return not wrong, f"requests {wrong} differ" if wrong else f"{len(landed)} compared"


def target_dies(bed: Bed, source: WorkerProcess, target: WorkerProcess) -> list[Line]:
    prompts = prompts_for(bed)
    free = source.ready.num_blocks
    pin(source, prompts)
    pull_all(source, target, prompts)
    target.process.kill()
    target.process.wait()
    for number in range(NUM_PULLS):
        source.send(Cancel(number))
        source.expect(Dropped, number)
    given_back = source.load[3] == free
    source.prefill(1000, prompts[0], max_tokens=8)
    source.finish(1000)
    note = f"{source.load[3]} of {free} blocks are free"
    return [
        check(
            "the target is killed during pulls: the source gives all blocks back", given_back, note
        ),
        check("and serves on", len(source.streams[1000]) == 8),
    ]


# ---- a whole node


def node_goes_on(bed: Bed, folder: Path) -> Line:
    settings = {
        "model": write_config(bed.small, folder / "small"),
        "load_format": "dummy",
        "device": "cuda",
        "dtype": "float32",
        "layout": "1p2d",
        "gpus": "0,0,0",
        "max_model_len": bed.pick(1024, 128),
        "max_num_seqs": bed.pick(16, 4),
        "max_num_batched_tokens": bed.pick(1024, 64),
        "kv_memory": bed.pick("1GiB", "4MiB"),
    }
    prompts = [prompt[: 20 + 3 * number] for number, prompt in enumerate(prompts_for(bed))]
    num_tokens = bed.pick(400, 24)
    with served(bed, folder, "node", **settings) as node:
        wanted = all_tokens(node.socket, prompts, num_tokens)
        found, midway = asyncio.run(killed_midway(node, prompts, num_tokens))
    name = "a decode worker of a node is killed: every stream goes on to its end"
    broken = [
        number
        for number, (answer, tokens) in enumerate(zip(found, wanted, strict=True))
        if answer.end is None or answer.end.code is not None or answer.tokens != tokens
    ]
    note = f"streams {broken} differ or failed" if broken else f"{midway} ran on it"
    return check(name, not broken and midway > 0, note)


async def killed_midway(
    node: Node, prompts: list[list[int]], num_tokens: int
) -> tuple[list[Answer], int]:
    """SIGKILL for the last worker once it decodes; also how many streams it had then."""
    streams = asyncio.create_task(ask(node.socket, prompts, at_once=True, max_tokens=num_tokens))
    while True:
        worker = (await stats_of(node.socket))["workers"][-1]
        if worker["running"] or streams.done():
            break
    running = 0 if streams.done() else int(worker["running"])
    os.kill(int(worker["pid"]), signal.SIGKILL)
    return await streams, running
