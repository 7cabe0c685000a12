"""Worker processes: started by name, watched, ended.

The coordinator never imports worker code: it starts `python -m nodeserve.worker`, so it never loads
torch, and tests start a fake worker instead. Rings, page pools and doorbells are made here and
inherited as descriptors; no name outlives the moment a worker has mapped its own.

Each life of a worker has rings and a bell of its own. Its page pool is one for all lives: every
other worker has inherited the descriptor, and while one holds it the memory stays taken. What an
earlier life wrote there nobody is told to read.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict

import posix_ipc

from nodeserve.config import WorkerSpec
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.placement import Plan
from nodeserve.coordinator.places import Place
from nodeserve.coordinator.shared import Shared
from nodeserve.errors import ConfigError, RingError
from nodeserve.expert_counts import Counts
from nodeserve.log import about, logger
from nodeserve.policy.startup import Start
from nodeserve.policy.watchdog import Watchdog
from nodeserve.types import MAX_CONSTRAINT_BYTES, Role
from nodeserve.wire.channel import TEAM_RING_BYTES, CoordinatorEnd
from nodeserve.wire.messages import Shutdown

WORKER_COMMAND = (sys.executable, "-m", "nodeserve.worker")
MIN_RING_BYTES = 1 << 20
EXIT_GRACE_S = 5.0
DOOR_S = 0.02  # the coordinator answers in a tenth of it; past it a worker goes on by itself
IDLE_WAIT_S = 1.0  # an idle worker gives a sign of life so often
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
LAST_WORDS_S = 0.2  # for what a worker wrote before it ended
READ_BYTES = 1 << 16
MAX_LINE_BYTES = 2000


def ring_bytes(max_model_len: int, max_num_seqs: int) -> int:
    """Room for several of the largest records, so that no accepted request can be too large.

    To a worker: a full context's ids with the largest sampling (32 KiB and a constraint). From a
    worker: a step of `max_num_seqs` tokens, each with its logprobs (under 512 bytes).
    """
    largest = max(4 * max_model_len + (32 << 10) + MAX_CONSTRAINT_BYTES, 512 * max_num_seqs)
    return max(MIN_RING_BYTES, 1 << (4 * largest).bit_length())


def team_ring_bytes(max_model_len: int) -> int:
    """Room for the pulls of two full contexts: in each two ids of four bytes for every block, of 16
    tokens at least."""
    return max(TEAM_RING_BYTES, 1 << max_model_len.bit_length())


def make_pages_fd(node_id: str, index: int) -> int:
    """A page pool of size 0, nameless: its worker sizes it once it knows the model."""
    name = f"/nodeserve-{os.getpid()}-{node_id}-pages{index}"
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    segment.unlink()
    return int(segment.fd)


def make_experts_fd(counts: Counts) -> int:
    """Memory with counts that ranks share experts by, which nobody can change any more: all lives
    of all ranks read the same, whatever becomes of the file."""
    fd = os.memfd_create("nodeserve-experts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(fd, "wb", closefd=False) as memory:
        memory.write(json.dumps(counts).encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


class Supervisor:
    """Owns every child process and all that they inherit."""

    def __init__(self, plan: Plan, model: str, node_id: str, command: Sequence[str]) -> None:
        self.links: list[WorkerLink] = []  # the present life of each worker
        self._plan = plan
        self._model = model
        self._node_id = node_id
        self._command = command
        self._experts_fd = -1  # -1: there are no counts
        self._pages_fds: list[int] = []  # one for all lives: peers have inherited it
        self._shared: dict[int, Shared] = {}  # by instance, where it has several workers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Supervisor":
        try:
            self._make_links()
        except (OSError, RingError, posix_ipc.Error) as problem:
            self._close()
            raise self._does_not_fit(problem) from None
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def _close(self) -> None:
        for link in self.links:
            link.channel.close()
        for shared in self._shared.values():
            shared.close()
        self._stack.close()

    def _make_links(self) -> None:
        if self._plan.expert_counts is not None:
            self._experts_fd = make_experts_fd(self._plan.expert_counts)
            self._stack.callback(os.close, self._experts_fd)
        for index in range(len(self._plan.places)):
            pages_fd = make_pages_fd(self._node_id, index)
            self._stack.callback(os.close, pages_fd)
            self._pages_fds.append(pages_fd)
            self.links.append(self._make_link(index, 0))
        for instance in range(len(self._plan.layout.instances)):
            self._renew_shared(instance)

    def _make_link(self, index: int, life: int) -> WorkerLink:
        place = self._plan.places[index]
        channel = CoordinatorEnd(self._node_id, f"w{index}.{life}", self._ring_bytes())
        link = WorkerLink(index, place.role, channel, self._pages_fds[index])
        link.gpu = place.gpus[0] if place.gpus else None
        link.instance, link.rank, link.num_restarts = place.instance, place.rank, life
        link.shape = self._plan.layout.instances[place.instance].shape
        link.watchdog = Watchdog(self._plan.policies.step_timeout_s)
        return link

    def renew(self, instance: int) -> list[WorkerLink]:
        """Links for the next life of its ranks, in the place of the last ones, whose processes have
        ended and whose channels are closed by this. ConfigError if the machine has no room."""
        try:
            for link in self._ranks(instance):
                link.channel.close()
                fresh = self._make_link(link.index, link.num_restarts + 1)
                fresh.reason, fresh.joining = link.reason, True
                self.links[link.index] = fresh
            self._renew_shared(instance)
        except (OSError, RingError, posix_ipc.Error) as problem:
            raise self._does_not_fit(problem) from None
        return self._ranks(instance)

    def _ranks(self, instance: int) -> list[WorkerLink]:
        return [link for link in self.links if link.instance == instance]

    def _renew_shared(self, instance: int) -> None:
        """What its workers share in the life to come, whose links are made."""
        if old := self._shared.pop(instance, None):
            old.close()
        ranks = self._ranks(instance)
        if len(ranks) > 1 or self._plan.simulated is not None:
            label = f"i{instance}.{ranks[0].num_restarts}"
            channels = [link.channel.spec for link in ranks]
            shape = self._plan.layout.instances[instance].shape
            room = team_ring_bytes(self._plan.max_model_len)
            self._shared[instance] = Shared(self._node_id, label, channels, shape.team_size, room)

    async def spawn(self, links: Sequence[WorkerLink]) -> None:
        """Start these; returns when the processes exist, not when they are ready."""
        try:
            await self._spawn(links)
        except OSError as problem:
            raise self._does_not_fit(problem) from None

    def _does_not_fit(self, problem: Exception) -> ConfigError:
        return ConfigError(
            f"layout {self._plan.layout} does not fit this machine: {problem}; use fewer workers,"
            " raise `ulimit -n` or the size of /dev/shm, or lower --max-model-len or --max-num-seqs"
        )

    async def _spawn(self, links: Sequence[WorkerLink]) -> None:
        for link in links:
            shared = self._shared.get(link.instance)
            more = () if shared is None else shared.inherited_by(link.rank)
            if self._experts_fd >= 0:
                more = (*more, self._experts_fd)
            link.start = Start(self._plan.startup_timeout_s, time.monotonic())
            link.process = await asyncio.create_subprocess_exec(
                *self._command,
                "--spec",
                self._spec(link).to_json(),
                pass_fds=(*link.channel.inherited_fds, *self._pages_fds, *more),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **worker_environment(self._plan.places[link.index])},
            )

    async def watch(self, link: WorkerLink) -> str:
        """Wait for a worker's end, keeping what it writes; says how it ended.

        Its end is that of its process: a child that it leaves may keep its stderr open, and our end
        is then closed.
        """
        assert link.process is not None
        reading = asyncio.ensure_future(keep_lines(link))
        code = await link.process.wait()
        await asyncio.wait({reading}, timeout=LAST_WORDS_S)
        reading.cancel()
        link.process._transport.close()  # type: ignore[attr-defined]  # asyncio has no public way
        return describe_exit(code)

    async def stop(self, hurried: asyncio.Event) -> None:
        """Ask, then kill, at once where nobody would listen: in a worker that loads, or when
        `hurried`. Returns when no child is left."""
        for link in self.links:
            if link.leads:  # followers leave with their leader
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
        shared = self._shared.get(link.instance)
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
            idle_wait_s=self._idle_wait_s(),
            pages_fd=link.pages_fd,
            channel=asdict(link.channel.spec),
            load_format=config.load_format,
            model_impl=config.model_impl,
            gpus=place.gpus,
            gpu_share=place.gpu_share,
            gpu_memory_utilization=config.gpu_memory_utilization,
            attention_backend=config.attention_backend,
            handoff=config.handoff,
            enforce_eager=config.enforce_eager,
            instance=link.instance,
            rank=link.rank,
            tp=link.shape.tp,
            pp=link.shape.pp,
            ep=link.shape.ep,
            team=() if shared is None else shared.team_of(link.rank),
            rendezvous_fd=-1 if shared is None else shared.rendezvous,
            experts_fd=self._experts_fd,
            redundant_experts=config.redundant_experts,
            board_fd=-1 if shared is None else shared.lockstep.board,
            bell_fds=() if shared is None else shared.lockstep.bells,
            simulated=self._plan.simulated,
        )

    def _holds_door(self, link: WorkerLink) -> bool:
        """Where passes follow each other through stages, the next one is never far."""
        holds = self._plan.policies.dispatch.holds_door
        return holds and link.role is Role.PREFILL and link.shape.pp == 1

    def _idle_wait_s(self) -> float:
        """Well within what makes an idle worker look hung."""
        timeout_s = self._plan.policies.step_timeout_s
        return IDLE_WAIT_S if timeout_s is None else min(IDLE_WAIT_S, timeout_s / 4)

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


async def keep_lines(link: WorkerLink) -> None:
    """Log what a worker writes, and keep the last of it."""
    assert link.process is not None and link.process.stderr is not None
    async for text in short_lines(link.process.stderr):
        link.stderr_tail.append(text)
        extra = about("worker_says", worker=link.index)
        logger.warning("worker %d: %s", link.index, text, extra=extra)


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
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL, by hand or for want of memory"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
