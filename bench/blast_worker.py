"""A worker that costs nothing: it sends pre-made step records as fast as the ring takes them.

Started by bench.coordinator in place of `nodeserve.worker`, so that what is measured is the
coordinator. Every running request gets token 7 in every step until its max_tokens.
"""

import os
import sys
import time
from typing import Any

from nodeserve.config import WorkerSpec
from nodeserve.wire.channel import ChannelSpec, WorkerEnd
from nodeserve.wire.messages import (
    FROM_WORKER,
    TO_WORKER,
    Cancel,
    Dropped,
    Mapped,
    Prefill,
    Prompt,
    Ready,
    Shutdown,
    StepDone,
    ToWorker,
    pack_ids,
    pack_request_ids,
    pack_times,
)

NUM_BLOCKS = 1 << 20
TOKEN = 7


class Blaster:
    """Running requests with the same number of tokens left share one record per step."""

    def __init__(self, end: WorkerEnd) -> None:
        self.end = end
        self.left: dict[int, int] = {}
        self.started: list[int] = []
        self.stopped = False
        self.num_received = 0
        self._record: bytes | None = None

    def apply(self, message: ToWorker) -> None:
        match message:
            case Prefill():
                for prompt in (Prompt(*fields) for fields in message.prompts):
                    self.left[prompt.request_id] = int(prompt.sampling["max_tokens"])
                    self.started.append(prompt.request_id)
                    self.num_received += 1
                self._record = None
            case Cancel():
                self.left.pop(message.request_id, None)
                self._record = None
                self.put(Dropped(message.request_id, self.load()))
            case Shutdown():
                self.stopped = True

    def load(self) -> list[int]:
        return [len(self.left), 0, 0, NUM_BLOCKS, 0, self.num_received]

    def put(self, message: Any) -> None:
        self.end.outbox.put(FROM_WORKER.encode(message))

    def step(self) -> None:
        """One token for everyone; the record is made anew only when the batch changes."""
        stepped = list(self.left)
        finished = set()
        for request_id in stepped:
            self.left[request_id] -= 1
            if not self.left[request_id]:
                finished.add(request_id)
                del self.left[request_id]  # before the record: its load is what is held after it
        if self._record is None or finished or self.started:
            self._record = self.make_record(stepped, finished)
        self.end.outbox.put(self._record)
        if finished or self.started:
            self._record = None
        self.started.clear()

    def make_record(self, ids: list[int], finished: set[int]) -> bytes:
        now_s = time.monotonic()
        step = StepDone(
            request_ids=pack_request_ids(ids),
            token_ids=pack_ids([TOKEN] * len(ids)),
            finish=bytes(2 if request_id in finished else 0 for request_id in ids),
            logprobs=None,
            kv_ready=[],
            started=pack_request_ids(self.started),
            preempted=b"",
            load=self.load(),
            step=0,
            began_s=now_s,
            step_s=1e-5,
            num_prefill_tokens=len(self.started),
            attention=float(bool(self.started)),
            num_decodes=len(ids) - len(self.started),
            kv_tokens=0,
            received=pack_times([now_s] * len(self.started)),
        )
        return FROM_WORKER.encode(step)


def main() -> None:
    spec = WorkerSpec.from_json(sys.argv[sys.argv.index("--spec") + 1])
    os.sched_setaffinity(0, spec.cpus)
    with WorkerEnd(ChannelSpec(**spec.channel)) as end:  # type: ignore[arg-type]
        blaster = Blaster(end)
        blaster.put(Mapped(os.getpid()))
        blaster.put(Ready(NUM_BLOCKS, 1, 1, 0, b"", "none: pre-made records", "none", 0.0))
        while not blaster.stopped:
            for record in end.inbox.drain():
                blaster.apply(TO_WORKER.decode(record))
            if blaster.left:
                blaster.step()
            else:
                end.inbox.wait(1.0)


if __name__ == "__main__":
    main()
