"""Where the rings of a fake node are: the records to a worker; what it says needs none."""

from collections import deque


class FakeChannel:
    """Both ends of both rings, never full."""

    def __init__(self) -> None:
        self.records: deque[bytes] = deque()
        self.inbox = self.outbox = self
        self.num_stalls = 0

    max_record_bytes = capacity_bytes = 1 << 20

    @property
    def num_queued(self) -> int:
        return len(self.records)

    @property
    def pending_bytes(self) -> int:
        return sum(map(len, self.records))

    def post(self, record: bytes) -> None:
        self.records.append(record)
