"""Times of work on a device: events on the stream for a GPU, the clock for a CPU."""

import statistics
import time
from collections.abc import Callable

import torch


def median_s(
    call: Callable[[], object], device: torch.device, repeats: int, warm: int = 3
) -> float:
    """Median seconds of one call; `call` enqueues its work and need not wait for it."""
    for _ in range(warm):
        call()
    return statistics.median(
        _event_times(call, repeats) if device.type == "cuda" else _clock_times(call, repeats)
    )


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run`, run once and made a CUDA graph, so that launches do not count; on a CPU as it is."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _clock_times(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return times


def _event_times(call: Callable[[], object], repeats: int) -> list[float]:
    """All calls are enqueued before the first is waited for, so the host is out of the numbers."""
    pairs = []
    torch.cuda.synchronize()
    for _ in range(repeats):
        first, last = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in pairs]


def busy_and_gaps(spans: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """From (start, end) of pieces of work, in any order and overlapping: the time that at least one
    ran, and the pauses between them in their order."""
    busy, gaps = 0.0, []
    begin = reach = None
    for start, end in sorted(spans):
        if reach is None or begin is None:
            begin, reach = start, end
        elif start > reach:
            gaps.append(start - reach)
            busy += reach - begin
            begin, reach = start, end
        else:
            reach = max(reach, end)
    if reach is not None and begin is not None:
        busy += reach - begin
    return busy, gaps
