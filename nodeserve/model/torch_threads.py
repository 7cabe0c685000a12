"""Threads for work that is torch's own on a CPU worker: many small products, one thread each.

torch's products of this size want one thread (`mla_cpu.py` says why), and they leave Python's lock
while they compute, so several threads can take such products side by side.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Job = Callable[[], None]


class TorchThreads:
    """The caller and `num_threads - 1` others, each on its own of `cpus` where these are given."""

    def __init__(self, num_threads: int, cpus: Sequence[int] = ()) -> None:
        self._others = num_threads - 1
        cores = iter(cpus[1:])  # the first is the caller's

        def begin() -> None:
            torch.set_num_threads(1)
            if (core := next(cores, None)) is not None:
                os.sched_setaffinity(0, [core])

        self._pool = ThreadPoolExecutor(max(self._others, 1), "torch", begin)

    def run(self, jobs: Sequence[Job]) -> None:
        """All of them, in any order; each writes what no other reads or writes. Raises what one
        of them raised, when all threads have ended with theirs."""
        todo = iter(jobs)  # each thread takes the next one: the list's iterator is atomic
        helping = [self._pool.submit(_work, todo) for _ in range(min(self._others, len(jobs) - 1))]
        try:
            _work(todo)
        finally:
            problems = [one.exception() for one in helping]
        for problem in problems:
            if problem is not None:
                raise problem


@torch.inference_mode()
def _work(todo: Iterator[Job]) -> None:
    for job in todo:
        job()
