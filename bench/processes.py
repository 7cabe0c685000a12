"""Two processes, each on a core of its own: what a benchmark between processes is made of."""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator

LIMIT_S = 300
CORES = sorted(os.sched_getaffinity(0))
Samples = list[int]
now_ns = time.perf_counter_ns  # the monotonic clock of the machine: the same in every process


def together(here: Callable[[], Samples], there: Callable[[], Samples]) -> tuple[Samples, Samples]:
    """Run both at once, `there` in a process and, if there is one, on a core of its own."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(there, write_fd)
    os.close(write_fd)
    os.sched_setaffinity(0, {CORES[0]})
    ours = here()
    with os.fdopen(read_fd) as pipe:
        theirs = json.load(pipe)
    os.waitpid(pid, 0)
    return ours, theirs


def _run_child(work: Callable[[], Samples], write_fd: int) -> None:
    code = 1
    try:
        signal.alarm(LIMIT_S)
        os.sched_setaffinity(0, {CORES[-1]})
        with os.fdopen(write_fd, "w") as pipe:
            json.dump(work(), pipe)
        code = 0
    except Exception:  # noqa: BLE001  the child's edge: nothing may reach the parent's stack
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def awake(core: int) -> Iterator[None]:
    """Keep a core from halting; whoever else wants it gets it at once."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT_S)
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while True:
            pass
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def paced(num: int, gap_us: int) -> Iterator[None]:
    """Turn after turn, busy in between as a process with work to do would be."""
    for _ in range(num):
        due_ns = now_ns() + gap_us * 1000
        while now_ns() < due_ns:
            pass
        yield
