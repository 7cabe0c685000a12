"""A worker process from its first line to its exit code, whatever the device.

The coordinator decides when a worker ends. Signals for the whole process group (Ctrl-C, a closed
terminal, a service manager's SIGTERM) are the coordinator's business and ignored here: requests can
still finish then. The kernel kills a worker when the coordinator dies.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from nodeserve.config import WorkerSpec
from nodeserve.errors import ConfigError, NodeServeError
from nodeserve.log import tell_keeper
from nodeserve.policy.batching import Limits
from nodeserve.policy.copy_plan import PageShard
from nodeserve.policy.scheduler import Scheduler
from nodeserve.wire.channel import TeamEnd
from nodeserve.wire.messages import Failed, Loading, Mapped, Ready
from nodeserve.worker.contract import ALONE, Device, Load, Progress, Transfer
from nodeserve.worker.follower import Follower
from nodeserve.worker.link import LeaderLink, RingLink
from nodeserve.worker.peer_seats import PeerSeats
from nodeserve.worker.runner import Runner
from nodeserve.worker.team import LeaderTeam
from nodeserve.worker.team_transfer import TeamTransfer

PROGRESS_EVERY_S = 0.05
_PR_SET_PDEATHSIG = 1


def main(load: Load, arguments: Sequence[str] | None = None) -> int:
    """`python -m nodeserve.worker --spec JSON`; tests start theirs with another `load`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description="One nodeserve worker; `nodeserve start` runs it.")
    parser.add_argument("--spec", required=True, help="a WorkerSpec as JSON")
    spec = WorkerSpec.from_json(parser.parse_args(arguments).spec)
    die_with_parent(spec.parent_pid)
    tell_keeper()
    with RingLink(spec.channel) as link, contextlib.ExitStack() as stack:
        ends = [stack.enter_context(link.team_end(one, spec.leads)) for one in spec.team]
        link.put(Mapped(os.getpid()))
        try:
            if spec.leads:
                serve(spec, load, link, ends)
            else:
                follow(spec, load, link, ends[0])
        except Exception as problem:  # noqa: BLE001 the process boundary: whatever it is, say so
            link.put(failure(problem))
            return 1
    return 0


def serve(spec: WorkerSpec, load: Load, link: RingLink, ends: Sequence[TeamEnd]) -> None:
    """Load the device, say so, and step until told to stop; with followers, if `ends` has any."""
    began = time.perf_counter()
    pin(spec.cpus)
    team = LeaderTeam(ends, link.wait, link.beat)
    device = load(spec, throttled(link), team)
    transfer = device.transfer
    if ends:
        transfer = TeamTransfer(transfer, team, offers_at_once=not device.pages_handle)
    runner = Runner(
        link,
        Scheduler(limits(spec, device)),
        device.executor,
        transfer,
        seats(spec, device.pages, transfer),
        door_s=spec.door_s,
        idle_wait_s=spec.idle_wait_s,
        expert_rows=device.expert_rows,
    )
    ready(device, link, began)
    runner.run()
    team.leave()


def follow(spec: WorkerSpec, load: Load, link: RingLink, end: TeamEnd) -> None:
    """Load the device, and do what the leader says until it leaves."""
    began = time.perf_counter()
    pin(spec.cpus)
    device = load(spec, throttled(link), ALONE)
    assert device.following is not None, "a device whose workers can follow"
    follower = Follower(
        link,
        LeaderLink(end, link.beat),
        device.following,
        device.transfer,
        seats(spec, device.pages, device.transfer),
        spec.idle_wait_s,
        device.expert_rows,
        device.forget_rows,
    )
    device.executor.on_done(link.wake)
    ready(device, link, began)
    follower.run(device.num_blocks)


def ready(device: Device, link: RingLink, began_s: float) -> None:
    """All is loaded, and lives as long as the process: no collection need look at it again."""
    gc.collect()
    gc.freeze()
    link.put(
        Ready(
            device.num_blocks,
            device.block_bytes,
            device.num_threads,
            device.pages_bytes,
            device.pages_handle,
            device.kernels,
            device.handoff,
            time.perf_counter() - began_s,
        )
    )


def seats(spec: WorkerSpec, pages: PageShard, transfer: Transfer) -> PeerSeats:
    """Workers of a node's instances of one shape each have another turn, and among peers of their
    own shape their own number."""
    return PeerSeats(transfer, pages, spec.instance * spec.num_workers + spec.rank)


def limits(spec: WorkerSpec, device: Device) -> Limits:
    return Limits(
        num_blocks=device.num_blocks,
        block_size=spec.block_size,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        eos_token_ids=device.eos_token_ids,
        num_stages=device.num_stages,
        attention_weight=device.attention_weight,
    )


def failure(problem: Exception) -> Failed:
    """What the coordinator tells people; an unexpected one leaves its traceback on stderr."""
    if isinstance(problem, NodeServeError):
        return Failed(problem.code, str(problem))
    traceback.print_exception(problem, file=sys.stderr)
    return Failed(NodeServeError.code, f"{type(problem).__name__}: {problem}")


def throttled(link: RingLink) -> Progress:
    """Progress records, at most one in 50 ms but always the first and the last of a phase."""
    last_s, last_phase = 0.0, ""

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal last_s, last_phase
        now_s = time.monotonic()
        if phase != last_phase or done >= total or now_s - last_s >= PROGRESS_EVERY_S:
            last_s, last_phase = now_s, phase
            link.beat()
            link.put(Loading(phase, done, total))

    return progress


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the coordinator ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def pin(cpus: Sequence[int]) -> None:
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as problem:
        raise ConfigError(f"cannot run on cores {list(cpus)}: {problem.strerror}") from None
