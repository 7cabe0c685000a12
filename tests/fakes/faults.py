"""Faults of workers to order: which one, and in the middle of what.

A test puts a file `INDEX.PHASE` with the name of a fault into the folder that the environment
names. The worker with this index takes the file away when it is next in that phase, and fails so,
once:

prefill, decode: it is about to run a pass with prompts, or with decodes; handoff: peers may read
pages of it, or it reads theirs; follow: it is about to take its part in a step of its leader; now:
whenever its loop turns.

A file `poison` stays: a worker that is about to run a pass with a request whose first token is
POISON fails so.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nodeserve._host import Ring
from nodeserve.config import WorkerSpec
from nodeserve.policy.batching import Batch
from nodeserve.worker.contract import (
    Device,
    Executor,
    Flight,
    Following,
    Load,
    Moved,
    Progress,
    Sampled,
    Team,
    Ticket,
    Transfer,
)

FOLDER = "NODESERVE_TEST_FAULTS"
POISON = 96
TIMEOUT_S = (
    1.0  # --step-timeout of nodes with faults: no busy machine keeps a worker waiting so long
)
SLOW_S = 0.2  # what a slow worker stands still


class Fault:
    """What is ordered for one worker."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._folder = Path(os.environ[FOLDER])
        self._spec = spec
        self.spins = False  # its passes never end, its loop turns

    def meet(self, phase: str) -> None:
        """The worker is in this phase: fail if that was ordered."""
        order = self._folder / f"{self._spec.index}.{phase}"
        try:
            name = order.read_text()
            order.unlink()
        except FileNotFoundError:
            return
        FAULTS[name](self)

    def taste(self, batch: Batch) -> None:
        """Fail at a poisoned request if that was ordered."""
        if any(work.sequence.token_ids[0] == POISON for work in batch.work):
            with contextlib.suppress(FileNotFoundError):
                FAULTS[(self._folder / "poison").read_text()](self)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def segv(self) -> None:
        ctypes.string_at(0)

    def exception(self) -> None:
        raise RuntimeError("a fault to order")

    def hang(self) -> None:
        time.sleep(1e6)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def slow(self) -> None:
        time.sleep(SLOW_S)

    def spin(self) -> None:
        self.spins = True

    def torn(self) -> None:
        """A record of random bytes, put beside the worker's own end of the ring."""
        channel: dict[str, Any] = self._spec.channel
        with mmap.mmap(channel["outbox_fd"], 0) as memory:
            ring = Ring(memory, False)
            assert ring.put(os.urandom(100))
            ring.close()
        os.eventfd_write(channel["eventfd"], 1)


FAULTS: dict[str, Callable[[Fault], None]] = {
    name: getattr(Fault, name)
    for name in ("kill", "segv", "exception", "hang", "stop", "slow", "spin", "torn")
}


class NeverDone:
    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def done(self) -> bool:
        return False

    def result(self) -> Sampled:
        return self._flight.result()


class FaultyExecutor:
    def __init__(self, inner: Executor, fault: Fault) -> None:
        self._inner = inner
        self._fault = fault
        self.called, self.leave, self.on_done = inner.called, inner.leave, inner.on_done
        self.opens_s = inner.opens_s

    @property
    def overlaps(self) -> bool:
        return self._inner.overlaps

    def launch(self, batch: Batch) -> Flight:
        self._fault.taste(batch)
        if batch.num_prefill_tokens:
            self._fault.meet("prefill")
        if batch.num_decodes:
            self._fault.meet("decode")
        flight = self._inner.launch(batch)
        return NeverDone(flight) if self._fault.spins else flight


class FaultyFollowing:
    def __init__(self, inner: Following, fault: Fault) -> None:
        self._inner = inner
        self._fault = fault
        self.choose, self.num_passed = inner.choose, inner.num_passed

    def follow(self, plan: bytes) -> None:
        self._fault.meet("follow")
        self._inner.follow(plan)


class FaultyTransfer:
    def __init__(self, inner: Transfer, fault: Fault) -> None:
        self._inner = inner
        self._fault = fault
        self._moving: set[int] = set()  # requests whose pages peers may read, or are on their way
        self.on_done, self.attach, self.detach = inner.on_done, inner.attach, inner.detach

    @property
    def busy(self) -> bool:
        return self._inner.busy

    def offer(self, request_id: int, block_ids: bytes) -> bytes | None:
        self._moving.add(request_id)
        return self._inner.offer(request_id, block_ids)

    def withdraw(self, request_id: int) -> None:
        self._moving.discard(request_id)
        self._inner.withdraw(request_id)

    def begin(self, ticket: Ticket) -> None:
        self._inner.begin(ticket)
        self._moving.add(ticket.request_id)

    def poll(self) -> list[Moved]:
        self._fault.meet("now")
        if self._moving:
            self._fault.meet("handoff")
        moved = self._inner.poll()
        for one in moved:
            self._moving.discard(one.request_id)
        return moved

    def cancel(self, request_id: int) -> None:
        self._moving.discard(request_id)
        self._inner.cancel(request_id)


def faulty(load: Load) -> Load:
    """The same device, with faults to order where the environment names a folder for them."""

    def loaded(spec: WorkerSpec, progress: Progress, team: Team) -> Device:
        device = load(spec, progress, team)
        if FOLDER not in os.environ:
            return device
        fault = Fault(spec)
        following = device.following
        return replace(
            device,
            executor=FaultyExecutor(device.executor, fault),
            transfer=FaultyTransfer(device.transfer, fault),
            following=None if following is None else FaultyFollowing(following, fault),
        )

    return loaded
