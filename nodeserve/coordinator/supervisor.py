"""Worker processes: started by name, watched, ended.

The coordinator never imports worker code: it starts `python -m nodeserve.worker`, so it never loads
torch, and tests start a fake worker instead. Rings, page pools and doorbells are made here and
inherited as descriptors; no name outlives the moment a worker has mapped its own.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

import posix_ipc

from nodeserve.config import WorkerSpec
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.placement import Place, Plan
from nodeserve.errors import ConfigError, RingError, WorkerLost
from nodeserve.log import logger
from nodeserve.policy.startup import Start
from nodeserve.types import Role
from nodeserve.wire.channel import CoordinatorEnd
from nodeserve.wire.messages import AttachPages, Shutdown

WORKER_COMMAND = (sys.executable, "-m", "nodeserve.worker")
MIN_RING_BYTES = 1 << 20
EXIT_GRACE_S = 5.0
DOOR_S = 0.02  # the coordinator answers in a tenth of it; past it a worker goes on by itself
READ_BYTES = 1 << 16
MAX_LINE_BYTES = 2000


def ring_bytes(max_model_len: int, max_num_seqs: int) -> int:
    """Room for several of the largest records, so that no accepted request can be too large.

    To a worker: a full context's ids with the largest sampling (32 KiB). From a worker: a step of
    `max_num_seqs` tokens, each with its logprobs (under 512 bytes).
    """
    largest = max(4 * max_model_len + (32 << 10), 512 * max_num_seqs)
    return max(MIN_RING_BYTES, 1 << (4 * largest).bit_length())


def make_pages_fd(node_id: str, index: int) -> int:
    """A page pool of size 0, nameless: its worker sizes it once it knows the model."""
    name = f"/nodeserve-{os.getpid()}-{node_id}-pages{index}"
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    segment.unlink()
    return int(segment.fd)


class LockstepFds(NamedTuple):
    """What the ranks of one instance share: memory of size 0, which the first of them sizes, and a
    bell for each."""

    board: int
    bells: tuple[int, ...]

    @property
    def inherited(self) -> tuple[int, ...]:
        return (self.board, *self.bells) if self.bells else ()


NO_LOCKSTEP = LockstepFds(-1, ())


def make_lockstep(owner: contextlib.ExitStack, num_ranks: int) -> LockstepFds:
    """Nameless; closed with `owner`, when every rank has inherited them."""
    fds = LockstepFds(
        os.memfd_create("nodeserve-lockstep"),
        tuple(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(num_ranks)),
    )
    for fd in fds.inherited:
        owner.callback(os.close, fd)
    return fds


class Supervisor:
    """Owns every child process and all that they inherit."""

    def __init__(self, plan: Plan, model: str, node_id: str, command: Sequence[str]) -> None:
        self.links: list[WorkerLink] = []
        self._plan = plan
        self._model = model
        self._node_id = node_id
        self._command = command
        self._lockstep: dict[int, LockstepFds] = {}  # by instance, where ranks need it
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Supervisor":
        try:
            self._make_links()
        except (OSError, RingError, posix_ipc.Error) as problem:
            self._stack.close()
            raise self._does_not_fit(problem) from None
        return self

    def _make_links(self) -> None:
        for index, place in enumerate(self._plan.places):
            channel = self._stack.enter_context(
                CoordinatorEnd(self._node_id, f"w{index}", self._ring_bytes())
            )
            pages_fd = make_pages_fd(self._node_id, index)
            self._stack.callback(os.close, pages_fd)
            link = WorkerLink(index, place.role, channel, pages_fd)
            link.gpu = place.gpus[0] if place.gpus else None
            link.instance, link.rank = place.instance, place.rank
            self.links.append(link)
        if self._plan.simulated is not None:
            for instance, group in enumerate(self._plan.layout.instances):
                self._lockstep[instance] = make_lockstep(self._stack, group.shape.num_workers)

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    async def start(self) -> None:
        """Spawn all workers; returns when the processes exist, not when they are ready."""
        try:
            await self._spawn()
        except OSError as problem:
            raise self._does_not_fit(problem) from None

    def _does_not_fit(self, problem: Exception) -> ConfigError:
        return ConfigError(
            f"layout {self._plan.layout} does not fit this machine: {problem}; use fewer workers,"
            " raise `ulimit -n` or the size of /dev/shm, or lower --max-model-len or --max-num-seqs"
        )

    async def _spawn(self) -> None:
        pool_fds = [link.pages_fd for link in self.links]
        for link in self.links:
            lockstep = self._lockstep.get(link.instance, NO_LOCKSTEP)
            link.start = Start(self._plan.startup_timeout_s, time.monotonic())
            link.process = await asyncio.create_subprocess_exec(
                *self._command,
                "--spec",
                self._spec(link).to_json(),
                pass_fds=(*link.channel.inherited_fds, *pool_fds, *lockstep.inherited),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **worker_environment(self._plan.places[link.index])},
            )

    async def watch(self, link: WorkerLink) -> str:
        """Wait for a worker's end, keeping what it writes; says how it ended."""
        assert link.process is not None and link.process.stderr is not None
        async for text in short_lines(link.process.stderr):
            link.stderr_tail.append(text)
            logger.warning("worker %d: %s", link.index, text)
        return describe_exit(await link.process.wait())

    def end_instance(self, link: WorkerLink) -> list[WorkerLink]:
        """Its worker has ended: kill the other ranks of its instance, which cannot run a pass
        without it, and return them."""
        mates = [
            mate
            for mate in self.links
            if mate.instance == link.instance and mate is not link and mate.state != "lost"
        ]
        for mate in mates:
            mate.give_up(WorkerLost(f"rank {link.rank} of its instance ended"))
        return mates

    def attach_pages(self) -> int:
        """Let every worker that decodes map every prefill worker's pool; how many maps that is."""
        for reader in self.links:
            for owner in self.links:
                if reader.decodes and owner.role is Role.PREFILL:
                    assert owner.info is not None
                    info = owner.info
                    reader.send(
                        AttachPages(
                            owner.index, owner.pages_fd, info.pages_bytes, info.pages_handle
                        )
                    )
                    reader.num_unattached += 1
        return sum(reader.num_unattached for reader in self.links)

    async def stop(self, hurried: asyncio.Event) -> None:
        """Ask, then kill, at once where nobody would listen: in a worker that loads, or when
        `hurried`. Returns when no child is left."""
        for link in self.links:
            link.send(Shutdown())
            if link.info is None:
                link.kill()
        gone = asyncio.create_task(self._gone())
        hurry = asyncio.create_task(hurried.wait())
        try:
            either = (gone, hurry)
            await asyncio.wait(either, timeout=EXIT_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            for link in self.links:
                link.kill()
            await asyncio.wait([gone], timeout=EXIT_GRACE_S)
        finally:
            gone.cancel()
            hurry.cancel()

    async def _gone(self) -> None:
        for link in self.links:
            if link.process is not None:
                await link.process.wait()

    def _spec(self, link: WorkerLink) -> WorkerSpec:
        config, place = self._plan.config, self._plan.places[link.index]
        lockstep = self._lockstep.get(link.instance, NO_LOCKSTEP)
        return WorkerSpec(
            index=link.index,
            role=link.role.value,
            device=config.device,
            model=self._model,
            dtype=config.dtype,
            max_model_len=self._plan.max_model_len,
            block_size=config.block_size,
            kv_memory=self._plan.kv_memory,
            max_num_seqs=self._plan.max_num_seqs,
            max_num_batched_tokens=self._plan.max_num_batched_tokens,
            cpus=place.cpus,
            num_threads=place.num_threads,
            parent_pid=os.getpid(),
            door_s=DOOR_S if self._holds_door(link) else 0.0,
            pages_fd=link.pages_fd,
            channel=asdict(link.channel.spec),
            load_format=config.load_format,
            gpus=place.gpus,
            gpu_share=place.gpu_share,
            gpu_memory_utilization=config.gpu_memory_utilization,
            attention_backend=config.attention_backend,
            handoff=config.handoff,
            enforce_eager=config.enforce_eager,
            instance=link.instance,
            rank=link.rank,
            board_fd=lockstep.board,
            bell_fds=lockstep.bells,
            simulated=self._plan.simulated,
        )

    def _holds_door(self, link: WorkerLink) -> bool:
        return link.role is Role.PREFILL and self._plan.policies.dispatch.holds_door

    def _ring_bytes(self) -> int:
        return ring_bytes(self._plan.max_model_len, self._plan.max_num_seqs)


def worker_environment(place: Place) -> dict[str, str]:
    """What libraries read when they are loaded, before any code of ours can say it.

    A GPU worker sees its own GPU as number 0, and after it those it may have to read from: so no
    code can take another's by default, and peer access can still be asked for.
    """
    settings = {"OMP_NUM_THREADS": str(place.num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if place.gpus:
        settings["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the driver's tools number them
        settings["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.gpus))
    return settings


async def short_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length, cut to something that fits a log."""
    rest = b""
    while data := await stream.read(READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        rest = rest[:MAX_LINE_BYTES]
        for line in lines:
            yield line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
    if rest:
        yield rest.decode(errors="replace").rstrip()


def describe_exit(code: int) -> str:
    """A process's end in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def lost(link: WorkerLink, how: str) -> WorkerLost:
    """The error for a worker that ended, with the last thing it wrote."""
    last = f": {link.stderr_tail[-1]}" if link.stderr_tail else ""
    return WorkerLost(f"{link.role.value} worker {link.index} {how}{last}")
