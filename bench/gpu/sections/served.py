"""Through the real server: two workers on one GPU, one prefills and one decodes an 8B model.

start    from the process's start to ready, with kernels compiled by an earlier section
wait     a client's gap between its first and second token, less its usual gap between tokens:
         what the handoff costs it
"""

import asyncio
import statistics
import tempfile
from pathlib import Path

from bench.gpu.bed import Bed
from bench.gpu.lines import Line, at_most, check
from bench.gpu.serving import Answer, Node, ask, served, stats_of
from bench.gpu.shapes import write_config
from bench.report import percentile

START_AIM_S, WAIT_AIM_MS = 30.0, 10.0
NUM_OUTPUT = 24


def run(bed: Bed) -> None:
    bed.hurry()
    with tempfile.TemporaryDirectory(prefix="nodeserve-served-") as name:
        folder = Path(name)
        settings = {
            "model": write_config(bed.model, folder / "model"),
            "load_format": "dummy",
            "device": "cuda",
            "dtype": bed.dtype_name,
            "layout": "1p1d",
            "gpus": "0,0",
            "max_model_len": bed.pick(9216, 512),
            "max_num_seqs": bed.pick(64, 4),
            "max_num_batched_tokens": bed.pick(8192, 256),
            "kv_memory": bed.pick("16GiB", "4MiB"),
        }
        with served(bed, folder, "served", **settings) as node:
            bed.sheet.add(start_line(bed, node))
            for num_tokens in bed.pick((2048, 8192), (64,)):
                bed.sheet.add(*waits(bed, node, num_tokens))
            bed.sheet.add(handed_over(bed, node))


def start_line(bed: Bed, node: Node) -> Line:
    limit_s = bed.pick(START_AIM_S, 120.0)
    return at_most("start to ready, dummy weights, 1p1d", node.start_s, "s", limit_s)


def waits(bed: Bed, node: Node, num_tokens: int) -> list[Line]:
    """One request at a time, then some while others decode."""
    alone = asyncio.run(one_by_one(bed, node.socket, num_tokens, bed.pick(12, 2)))
    beside = asyncio.run(beside_others(bed, node.socket, num_tokens, bed.pick(12, 2)))
    limit_ms = bed.pick(WAIT_AIM_MS, 60_000.0)
    return [
        wait_line(f"wait for the second token, prompt of {num_tokens}, {how}", found, limit_ms)
        for how, found in (("alone", alone), ("beside 8 streams", beside))
    ]


async def one_by_one(bed: Bed, socket: Path, num_tokens: int, count: int) -> list[Answer]:
    prompts = [prompt_of(bed, num_tokens, number) for number in range(count)]
    return await ask(socket, prompts, at_once=False, max_tokens=NUM_OUTPUT)


async def beside_others(bed: Bed, socket: Path, num_tokens: int, count: int) -> list[Answer]:
    """The streams that keep the decode worker busy are cancelled in the end, by hanging up."""
    short = [prompt_of(bed, 32, 1000 + number) for number in range(bed.pick(8, 1))]
    busy = asyncio.create_task(ask(socket, short, at_once=True, max_tokens=bed.pick(8000, 400)))
    try:
        return await one_by_one(bed, socket, num_tokens, count)
    finally:
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


def prompt_of(bed: Bed, num_tokens: int, number: int) -> list[int]:
    vocab_size = bed.model.vocab_size
    return [1 + (7919 * number + 31 * place) % (vocab_size - 1) for place in range(num_tokens)]


def wait_line(name: str, found: list[Answer], limit_ms: float) -> Line:
    """p50 of (second - first token) - the median of the later gaps of the same answer."""
    broken = [one for one in found if one.end is None or one.end.code or len(one.times_s) < 4]
    if broken or not found:
        return check(name, False, f"{len(broken)} of {len(found)} answers failed: {broken[:1]}")
    extra_ms = [1e3 * extra_wait_s(one.times_s) for one in found]
    p50 = percentile(extra_ms, 0.5)
    tpot_ms = 1e3 * statistics.median(usual_gap_s(one.times_s) for one in found)
    handoff_ms = statistics.median(
        1e3 * float(one.end.timings["handoff_s"]) for one in found if one.end is not None
    )
    note = (
        f"worst of {len(found)}: {max(extra_ms):.1f} ms; usual gap {tpot_ms:.2f} ms,"
        f" the copy {handoff_ms:.2f} ms"
    )
    # Below zero the second token came faster than the others: nothing was waited for.
    return at_most(name, max(p50, 0.0), "ms", limit_ms, note, extra_ms=extra_ms)


def usual_gap_s(times_s: list[float]) -> float:
    gaps = [later - earlier for earlier, later in zip(times_s[1:], times_s[2:], strict=False)]
    return statistics.median(gaps)


def extra_wait_s(times_s: list[float]) -> float:
    return times_s[1] - times_s[0] - usual_gap_s(times_s)


def handed_over(bed: Bed, node: Node) -> Line:
    """What the server says of itself: the pages went from worker to worker, and how."""
    stats = asyncio.run(stats_of(node.socket))
    bed.sheet.keep(stats=stats)
    workers = stats["workers"]
    count = sum(int(worker["handoffs"]) for worker in workers)
    roads = sorted({str(worker.get("handoff")) for worker in workers})
    return check(
        "every request was handed over", count >= 4, f"{count} handoffs, {', '.join(roads)}"
    )
