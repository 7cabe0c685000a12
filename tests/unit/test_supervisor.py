"""What the supervisor does without a process: sizes, and lines of any length."""

import asyncio
import mmap
import os
import resource
import secrets
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from nodeserve._host import Ring
from nodeserve.checkpoint import Checkpoint
from nodeserve.config import EngineConfig, ModelConfig
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.placement import resolve
from nodeserve.coordinator.places import Place
from nodeserve.coordinator.shared import Shared
from nodeserve.coordinator.supervisor import (
    MAX_LINE_BYTES,
    Supervisor,
    describe_exit,
    ring_bytes,
    short_lines,
    team_ring_bytes,
    worker_environment,
)
from nodeserve.errors import ConfigError, RingError
from nodeserve.gpus import Gpus
from nodeserve.policy.blocks import blocks_for
from nodeserve.types import MAX_CONSTRAINT_BYTES, Role
from nodeserve.wire.channel import SHM, CoordinatorEnd, WorkerEnd
from nodeserve.wire.messages import TO_WORKER, Prefill, Prompt, Shutdown, pack_ids
from nodeserve.wire.seal import SEAL_BYTES
from nodeserve.wire.team import TO_FOLLOWER, Pull


async def test_a_long_line_is_cut_and_the_next_ones_are_whole() -> None:
    """asyncio's own line reader raises above 64 KiB, and that ended the node."""
    stream = asyncio.StreamReader()
    stream.feed_data(b"first\n" + b"x" * 200_000 + b"\nsecond\nno newline")
    stream.feed_eof()
    lines = [line async for line in short_lines(stream)]
    assert [lines[0], *lines[2:]] == ["first", "second", "no newline"]
    assert set(lines[1]) == {"x"} and len(lines[1]) <= MAX_LINE_BYTES


def test_rings_hold_the_largest_record_several_times() -> None:
    for max_model_len, max_num_seqs in ((512, 16), (131_072, 64), (4096, 20_000)):
        room = ring_bytes(max_model_len, max_num_seqs)
        to_a_worker = 4 * max_model_len + 32 * 1024 + MAX_CONSTRAINT_BYTES
        assert room >= 4 * max(to_a_worker, 512 * max_num_seqs)


class DamagedChannel:
    def __init__(self) -> None:
        self.inbox = self

    def post(self, record: bytes) -> None:
        raise RingError("head is behind tail")


async def test_a_worker_behind_a_damaged_ring_is_ended() -> None:
    link = WorkerLink(0, Role.MIXED, DamagedChannel(), -1)  # type: ignore[arg-type]
    command = (sys.executable, "-c", "import signal; signal.pause()")
    link.process = await asyncio.create_subprocess_exec(*command)
    link.send(Shutdown())
    assert "was killed by SIGKILL" in describe_exit(await link.process.wait())
    assert str(link.death.result()) == "mixed worker 0 cannot be reached: head is behind tail"


def test_a_child_that_holds_a_workers_stderr_costs_no_descriptor() -> None:
    uvloop.run(_watch_who_leaves_a_child())  # the node's loop


async def _watch_who_leaves_a_child() -> None:
    num_open = []
    for _ in range(2):  # the loop keeps one descriptor for itself since its first child
        link = WorkerLink(0, Role.MIXED, DamagedChannel(), -1)  # type: ignore[arg-type]
        link.process = await asyncio.create_subprocess_exec(
            *("sh", "-c", "sleep 60 & echo $! >&2"), stderr=asyncio.subprocess.PIPE
        )
        supervisor = Supervisor(None, "x", "abcd", ())  # type: ignore[arg-type]
        assert "exit code 0" in await supervisor.watch(link)
        await asyncio.sleep(0)  # a transport closes in the next turn
        os.kill(int(link.stderr_tail[0]), signal.SIGKILL)
        num_open.append(len(os.listdir("/proc/self/fd")))
    assert num_open[0] == num_open[1]


def test_a_gpu_worker_sees_its_own_gpu_first() -> None:
    from_prefill = worker_environment(Place(Role.PREFILL, (), 4, gpus=(3, 1, 2)))
    assert from_prefill["CUDA_VISIBLE_DEVICES"] == "3,1,2"
    assert from_prefill["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert from_prefill["OMP_NUM_THREADS"] == "4"
    assert "CUDA_DEVICE_ORDER" not in worker_environment(Place(Role.MIXED, (0,), 1))


async def test_a_departure_passes_a_real_ring_whatever_its_size() -> None:
    """In as few records as the ring takes, nothing twice, in order."""
    prompts = [Prompt(number, pack_ids([number] * 300), 300, {}, True) for number in range(100)]
    with CoordinatorEnd(secrets.token_hex(4), "w0", 1 << 15) as channel:
        inbox_fd, outbox_fd, eventfd = map(os.dup, channel.inherited_fds)
        spec = replace(channel.spec, inbox_fd=inbox_fd, outbox_fd=outbox_fd, eventfd=eventfd)
        with WorkerEnd(spec) as worker:
            WorkerLink(0, Role.PREFILL, channel, -1).send_prompts(7, prompts)
            records: list[Prefill] = []
            while sum(len(one.prompts) for one in records) < len(prompts):
                for record in worker.inbox.drain():
                    message = TO_WORKER.decode(record)
                    assert isinstance(message, Prefill)
                    records.append(message)
                channel.inbox.flush()
    assert [Prompt(*fields) for one in records for fields in one.prompts] == prompts
    assert 4 <= len(records) <= 16, "a record holds 12 to 25 of them"
    numbers = [one.departure for one in records]
    assert numbers == [0] * (len(records) - 1) + [7], "it is there when its last piece is"


@pytest.mark.parametrize("spare_fds", range(16, 24))  # each is missed by another call
async def test_a_node_too_large_for_the_machine_is_refused_and_leaves_nothing(
    spare_fds: int,
) -> None:
    model = ModelConfig("llama", 100, 64, 128, 2, 4, 2, 16, 1024, 1e-5, 1e4)
    config = EngineConfig(device="sim", profile="moe-ep8", layout="4p4d", max_model_len=1024)
    plan = resolve(config, Checkpoint(Path("x"), "gguf", model, "tiny"), Gpus(obstacle="none"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + spare_fds, limits[1]))
    try:
        with pytest.raises(ConfigError, match="4p4d does not fit .*files.*`ulimit -n`"):
            Supervisor(plan, "x", "abcd", ()).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert not [path for path in SHM.iterdir() if f"-{os.getpid()}-abcd-" in path.name]


@pytest.mark.parametrize("max_model_len", [2, 1 << 17, (1 << 20) + 1, 10_000_000])
def test_a_team_can_be_told_of_the_longest_context(max_model_len: int) -> None:
    ids = bytes(4 * blocks_for(max_model_len, 16))
    record = TO_FOLLOWER.encode(Pull(2**63 - 1, 2**63 - 1, 2**31 - 1, ids, ids))
    room = team_ring_bytes(max_model_len)
    node = f"{os.getpid():x}"
    ends = [CoordinatorEnd(node, f"w{index}", 4096) for index in range(2)]
    with ends[0] as leader, ends[1] as follower:
        shared = Shared(node, "i0.0", [leader.spec, follower.spec], 2, room)
        (spec,) = shared.team_of(1)
        plans = Ring(mmap.mmap(int(spec["plans_fd"]), 0), False)
        assert plans.capacity == room
        assert 2 * (len(record) + SEAL_BYTES + 16) <= plans.capacity
        plans.close()
        shared.close()
