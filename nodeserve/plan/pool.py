"""Searches in several processes."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from nodeserve.plan.estimates import Run, in_turn
from nodeserve.plan.evaluate import Job, search
from nodeserve.plan.search import Found


@contextmanager
def searching(num_processes: int | None = None) -> Iterator[Run]:
    """Something that runs jobs, on so many processes: as many as there are cores, unless said; with
    one it is this one. They end with the block."""
    number = num_processes or len(os.sched_getaffinity(0))
    if number == 1:
        yield in_turn
        return
    context = multiprocessing.get_context("spawn")  # a caller may have threads
    with ProcessPoolExecutor(number, mp_context=context) as pool:

        def run(jobs: Sequence[Job]) -> list[Found]:
            return list(pool.map(search, jobs))

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
