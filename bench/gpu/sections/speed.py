"""Steps of an 8B model against what the card's own bandwidth and matrix rate allow.

decode   (weights + visible KV) / bandwidth; the mean of steps launched one behind the other
prefill  the step's operations / the matrix rate; from the launch to the token on the host
pauses   of the GPU while the real step loop decodes, from the profiler's timeline
load     requests in, tokens out, through the real step loop: `continuous` compares it
"""

import statistics
import tempfile
import time
from pathlib import Path

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.floors import causal_pairs, step_bytes, step_flops
from bench.gpu.bed import Bed
from bench.gpu.drive import Room, decode_s, prefill_s
from bench.gpu.lines import Line, at_most, check, share
from bench.gpu.local import LocalWorker
from bench.gpu.measure import busy_and_gaps
from bench.gpu.memory import settle
from bench.gpu.shapes import write_config
from bench.gpu.workload import Load, load_for
from nodeserve.worker.contract import Device

BATCHES, CONTEXTS, PROMPTS = (1, 8, 32, 64, 128, 256), (1024, 8192), (512, 2048, 8192)
DECODE_AIM, DECODE_AIM_TO = 0.8, 64
PREFILL_AIM, PREFILL_AIM_FROM = 0.65, 2048
GAP_BATCH, GAP_STEPS, GAP_US = 64, 50, 200.0


def run(bed: Bed) -> None:
    with tempfile.TemporaryDirectory(prefix="nodeserve-speed-") as folder:
        spec = bed.spec(
            str(write_config(bed.model, Path(folder))),
            max_model_len=bed.pick(9216, 128),
            max_num_seqs=bed.pick(256, 4),
            max_num_batched_tokens=bed.pick(8192, 64),
            kv_memory=bed.pick(None, 4 << 20),
        )
        began_s = time.perf_counter()
        device = bed.load(spec)
        load_s = time.perf_counter() - began_s
    room = Room(device.num_blocks, spec.block_size)
    kv_bytes = device.num_blocks * device.block_bytes
    bed.sheet.keep(kernels=device.kernels, load_s=load_s, kv_bytes=kv_bytes)
    bed.sheet.add(Line("the model is loaded and warm", "info", load_s, "s", note=device.kernels))
    fill_pages(bed, device)
    for context in bed.pick(CONTEXTS, (24,)):
        for count in bed.pick(BATCHES, (1, 4)):
            bed.sheet.add(decode_line(bed, device, room, count, context))
    for num_tokens in bed.pick(PROMPTS, (16, 40)):
        bed.sheet.add(prefill_line(bed, device, room, num_tokens))
    worker = LocalWorker(device, spec)
    bed.sheet.add(*pauses(bed, worker))
    bed.sheet.add(throughput(bed, worker, load_for(bed)))


def fill_pages(bed: Bed, device: Device) -> None:
    """Numbers where a run has zeros: the card is faster on zeros than on any model's pages."""
    cache = getattr(device.executor, "_cache", None)
    for layer in cache.layers if cache is not None else ():
        layer.normal_()
    settle(bed.device)
    filled = cache is not None and bool((cache.pages[-1] != 0).any())
    bed.sheet.add(check("pages hold random numbers before steps are timed", filled))


def decode_line(bed: Bed, device: Device, room: Room, count: int, context: int) -> Line:
    num_steps = bed.pick(24, 2)
    name = f"decode step, {count} x {context}"
    if not room.holds(count, context + num_steps + 8):
        # Not a check that was left out: the aim is for what fits.
        note = f"the KV of {count * context} tokens does not fit beside the weights"
        return Line(name, "info", note=note)
    seconds = decode_s(device.executor, room, count, context, num_steps)
    visible = count * (context + num_steps // 2)
    num_bytes = step_bytes(bed.model, bed.dtype.itemsize, visible)
    floor_s = num_bytes / bed.ceiling("bandwidth_gb_s") / 1e9
    flops = step_flops(bed.model, count, count, visible)
    flops_s = flops / bed.ceiling("gemm_tflop_s") / 1e12
    least = bed.aim(DECODE_AIM) if count <= DECODE_AIM_TO else None
    return share(
        name,
        1e3 * seconds,
        "ms",
        floor_s / seconds,
        least,
        f"floors: bytes {1e3 * floor_s:.2f} ms, operations {1e3 * flops_s:.2f} ms;"
        f" {count / seconds:,.0f} tokens/s",
        num_bytes=num_bytes,
        flops=flops,
        seconds=seconds,
    )


def prefill_line(bed: Bed, device: Device, room: Room, num_tokens: int) -> Line:
    times = prefill_s(device.executor, room, num_tokens, bed.pick(7, 2))
    seconds = statistics.median(times[1:])
    flops = step_flops(bed.model, num_tokens, 1, causal_pairs(num_tokens, num_tokens))
    floor_s = flops / bed.ceiling("gemm_tflop_s") / 1e12
    return share(
        f"prefill, {num_tokens} tokens",
        1e3 * seconds,
        "ms",
        floor_s / seconds,
        bed.aim(PREFILL_AIM) if num_tokens >= PREFILL_AIM_FROM else None,
        f"floor {1e3 * floor_s:.2f} ms, {flops / seconds / 1e12:.0f} TFLOP/s",
        flops=flops,
        seconds=seconds,
    )


# ---- pauses of the GPU


def pauses(bed: Bed, worker: LocalWorker) -> list[Line]:
    """Between a step's last kernel and the next one's first, in a steady batch."""
    count, context = bed.pick((GAP_BATCH, 1024), (2, 8))
    num_steps = bed.pick(GAP_STEPS, 6)
    ids = range(1_000_000, 1_000_000 + count)
    for one in ids:
        prompt = [1 + (one + place) % 97 for place in range(context)]
        worker.submit(one, prompt, max_tokens=num_steps + 40)
    while not all(len(worker.tokens.get(one, ())) >= 8 for one in ids):
        worker.turn()
    began, began_s = len(worker.steps), time.perf_counter()
    while len(worker.steps) < began + 16:
        worker.turn()
    step_s = (time.perf_counter() - began_s) / 16
    spans = profiled(bed, worker, num_steps - 24 if num_steps > 30 else 2)
    spans = sorted(spans)[len(spans) // 4 :]  # the profiler itself begins in the first steps
    worker.run(*ids)
    busy_us, gaps = busy_and_gaps(spans)
    name = f"{count} decodes in the step loop"
    if not gaps:
        return [check(f"pauses of the GPU, {name}", False, f"{len(spans)} kernels, no timeline")]
    longest = sorted(gaps)[-max(1, num_steps - 24) :]
    return [
        at_most(
            f"longest pause of the GPU, {name}",
            max(gaps),
            "us",
            bed.pick(GAP_US, 1e12),
            f"of the longest of each step the median is {statistics.median(longest):.0f} us;"
            f" busy {busy_us / (busy_us + sum(gaps)):.1%}",
        ),
        Line(f"step, {name}", "info", 1e3 * step_s, "ms"),
    ]


def profiled(bed: Bed, worker: LocalWorker, num_steps: int) -> list[tuple[float, float]]:
    """(start, end) in us of everything the device ran during that many steps."""
    on_gpu = bed.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    began = len(worker.steps)
    with profile(activities=[activity]) as timeline:
        while len(worker.steps) < began + num_steps:
            worker.turn()
    return [
        (event.time_range.start, event.time_range.end)
        for event in timeline.events() or ()
        if event.device_type == wanted
    ]


# ---- a load


def throughput(bed: Bed, worker: LocalWorker, load: Load) -> Line:
    ids = range(2_000_000, 2_000_000 + load.num_requests)
    for one, prompt in zip(ids, load.prompts(bed.model.vocab_size), strict=True):
        worker.submit(one, prompt, max_tokens=load.num_output)
    began_s = time.perf_counter()
    worker.run(*ids)
    seconds = time.perf_counter() - began_s
    written = sum(len(worker.tokens[one]) for one in ids)
    assert written == load.num_requests * load.num_output, f"{written} tokens came"
    bed.sheet.keep(load_tokens_per_s=written / seconds)
    return Line(
        f"{load.num_requests} requests, {load.num_prompt} tokens in and {load.num_output} out",
        "info",
        written / seconds,
        "tokens/s",
        note=f"{seconds:.2f} s, through the step loop",
    )
