"""Real worker processes over real rings, driven by hand: the test is the coordinator."""

import contextlib
import itertools
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import posix_ipc

from nodeserve.config import WorkerSpec
from nodeserve.types import Sampling, sampling_to
from nodeserve.wire.channel import CoordinatorEnd
from nodeserve.wire.messages import (
    FROM_WORKER,
    TO_WORKER,
    AttachPages,
    FromWorker,
    KvPulled,
    KvReady,
    Mapped,
    Prefill,
    Prompt,
    PullKv,
    Ready,
    ReleaseKv,
    StepDone,
    ToWorker,
    pack_ids,
    unpack_ids,
    unpack_request_ids,
)
from tests.fakes.model import FakeSettings
from tests.fakes.pages import WHOLE
from tests.patience import PATIENCE_S

FAKE_WORKER = (sys.executable, "-m", "tests.fakes.worker")
_LABELS = itertools.count()
Kind = TypeVar("Kind", bound=tuple[Any, ...])


def default_spec(**changes: Any) -> WorkerSpec:
    """A small worker; channel, pages and parent are filled in when it starts."""
    spec = WorkerSpec(
        index=0,
        role="mixed",
        device="cpu",
        model=FakeSettings().name,
        dtype="bfloat16",
        max_model_len=256,
        block_size=16,
        kv_memory=64 * 128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        cpus=(),
        num_threads=1,
        parent_pid=os.getpid(),
        door_s=0.0,
        idle_wait_s=1.0,
        pages_fd=-1,
        channel={},
        load_format="auto",
        gpus=(),
        gpu_share=1,
        gpu_memory_utilization=0.9,
        attention_backend="auto",
        handoff="auto",
        enforce_eager=False,
    )
    return replace(spec, **changes)


class WorkerProcess:
    """One worker and our end of its rings; remembers everything it said."""

    def __init__(
        self,
        spec: WorkerSpec,
        channel: CoordinatorEnd,
        process: subprocess.Popen[bytes],
        deadline_s: float = PATIENCE_S,
    ) -> None:
        self.spec = spec
        self.deadline_s = deadline_s
        self.channel = channel
        self.process = process
        self.said: list[FromWorker] = []
        self.streams: dict[int, list[int]] = {}
        self.finished: dict[int, int] = {}
        self.preempted: list[int] = []
        self.pinned: dict[int, bytes] = {}
        self._unread: list[FromWorker] = []

    def send(self, message: ToWorker) -> None:
        self.channel.inbox.post(TO_WORKER.encode(message))

    def prefill(
        self, request_id: int, prompt: Sequence[int], handoff: bool = False, **sampling: Any
    ) -> None:
        values = sampling_to(Sampling(**{"temperature": 0.0, **sampling}))
        self.send(Prefill(0, [Prompt(request_id, pack_ids(prompt), len(prompt), values, handoff)]))

    def pull(
        self, source: "WorkerProcess", request_id: int, prompt: Sequence[int], **sampling: Any
    ) -> None:
        """Pull what `source` has pinned; its first token is known by now."""
        values = sampling_to(Sampling(**{"temperature": 0.0, **sampling}))
        tokens = [*prompt, *source.streams[request_id]]
        block_ids = source.pinned[request_id]
        self.send(
            PullKv(request_id, source.spec.index, block_ids, pack_ids(tokens), len(prompt), values)
        )

    def attach(self, source: "WorkerProcess") -> None:
        ready, spec = source.ready, source.spec
        pages = spec.pages_fd, ready.pages_bytes, ready.pages_handle
        self.send(AttachPages(spec.index, *pages, spec.index, WHOLE))

    @property
    def ready(self) -> Ready:
        return next(message for message in self.said if isinstance(message, Ready))

    @property
    def load(self) -> list[int]:
        """As last reported."""
        loads = [getattr(message, "load", None) for message in self.said]
        return next(load for load in reversed(loads) if load is not None)

    def until(self, condition: Callable[[], bool]) -> None:
        """Take in records until `condition()`; the deadline only ends a broken test."""
        give_up_s = time.monotonic() + self.deadline_s
        while not condition():
            if not self._receive(give_up_s - time.monotonic()):
                raise AssertionError(f"worker is silent; it said {self.said[-5:]}")

    def expect(self, kind: type[Kind], request_id: int | None = None) -> Kind:
        """The next unread record of this kind (and request)."""
        found: list[Kind] = []

        def arrived() -> bool:
            for message in self._unread:
                if isinstance(message, kind) and (
                    request_id is None or getattr(message, "request_id", None) == request_id
                ):
                    self._unread.remove(message)
                    found.append(message)
                    return True
            return False

        self.until(arrived)
        return found[0]

    def finish(self, *request_ids: int) -> None:
        self.until(lambda: all(one in self.finished for one in request_ids))

    def _receive(self, timeout_s: float) -> bool:
        watched = select.select([self.channel.fileno()], [], [], max(timeout_s, 0))[0]
        for record in self.channel.receive():
            message = FROM_WORKER.decode(record)
            self.said.append(message)
            self._unread.append(message)
            if isinstance(message, StepDone):
                self._book(message)
            elif isinstance(message, KvReady):
                self.pinned[message.request_id] = message.block_ids
        return bool(watched)

    def _book(self, step: StepDone) -> None:
        ids, tokens = unpack_request_ids(step.request_ids), unpack_ids(step.token_ids)
        for request_id, token_id, finish in zip(ids, tokens, step.finish, strict=True):
            assert request_id not in self.finished, "a token after the end"
            self.streams.setdefault(request_id, []).append(token_id)
            if finish:
                self.finished[request_id] = finish
        self.preempted.extend(unpack_request_ids(step.preempted))
        for request_id, block_ids in step.kv_ready:
            self.pinned[request_id] = block_ids


@contextlib.contextmanager
def started(
    *specs: WorkerSpec,
    command: Sequence[str] = FAKE_WORKER,
    ring_bytes: int = 1 << 20,
    pass_fds: Sequence[int] = (),
    wait_ready: bool = True,
    environment: Mapping[str, str] | None = None,
    deadline_s: float = PATIENCE_S,
) -> Iterator[list[WorkerProcess]]:
    """Worker processes that know each other's page pools; killed at the end if they still live."""
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(_channel(ring_bytes)) for _ in specs]
        pages = [_pages_fd(stack) for _ in specs]
        workers = []
        for spec, channel, pages_fd in zip(specs, channels, pages, strict=True):
            spec = replace(spec, pages_fd=pages_fd, channel=asdict(channel.spec))
            process = subprocess.Popen(
                [*command, "--spec", spec.to_json()],
                pass_fds=(*channel.inherited_fds, *pages, *pass_fds),
                env={**os.environ, **(environment or {}), **visible(spec)},
            )
            stack.callback(_end, process)
            workers.append(WorkerProcess(spec, channel, process, deadline_s))
        for worker in workers:
            worker.expect(Mapped)
            worker.channel.unlink_names()
        for worker in workers if wait_ready else ():
            worker.expect(Ready)
        yield workers


def visible(spec: WorkerSpec) -> dict[str, str]:
    """What the supervisor tells a GPU worker's libraries."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.gpus))} if spec.gpus else {}


def _channel(ring_bytes: int) -> CoordinatorEnd:
    return CoordinatorEnd(f"{os.getpid():x}", f"t{next(_LABELS)}", ring_bytes)


def _pages_fd(stack: contextlib.ExitStack) -> int:
    name = f"/nodeserve-{os.getpid()}-ab-pages{next(_LABELS)}"
    segment = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    segment.unlink()
    stack.callback(os.close, segment.fd)
    return int(segment.fd)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def hand_over(
    source: WorkerProcess,
    target: WorkerProcess,
    request_id: int,
    prompt: Sequence[int],
    **sampling: Any,
) -> KvPulled:
    """Prefill here, pull there, release here."""
    source.prefill(request_id, prompt, handoff=True, **sampling)
    source.until(lambda: request_id in source.pinned)
    target.pull(source, request_id, prompt, **sampling)
    pulled = target.expect(KvPulled, request_id)
    source.send(ReleaseKv(request_id))
    return pulled
