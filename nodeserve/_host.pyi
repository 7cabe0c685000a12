"""The C++ host extension: shared-memory rings and CPU kernels. No CUDA, no torch."""

from collections.abc import Sequence
from typing import final

from typing_extensions import Buffer

# ---- ring (csrc/ring)

RING_HEADER_BYTES: int
"""What a ring's memory needs beyond its capacity."""

@final
class Ring:
    """One end of a single-producer single-consumer byte ring; csrc/ring/ring.h has the protocol.

    It keeps the buffer exported until `close`, so an mmap cannot be unmapped under it. Using a
    closed or a damaged ring raises RingError; a record above `max_record_bytes` RecordTooLarge.
    """

    def __init__(self, buffer: Buffer, create: bool) -> None: ...
    def close(self) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def max_record_bytes(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...

    # The producer's side.
    def put(self, record: Buffer) -> bool:
        """False: no room, nothing written."""
    def put_many(self, records: Sequence[Buffer]) -> int:
        """How many of the first records had room; they are published together."""
    def consumer_to_wake(self) -> bool:
        """True once for each announced sleep: ring the consumer's doorbell."""
    def arm_producer(self, record_bytes: int) -> bool:
        """Announce a wait for room. False: there is room already, do not wait."""
    def disarm_producer(self) -> None: ...
    def beat(self) -> None:
        """Count one turn of the producer's loop."""
    @property
    def beats(self) -> int: ...

    # The consumer's side.
    def drain(self, max_records: int = ...) -> list[bytes]: ...
    def producer_to_wake(self) -> bool:
        """True once for each announced wait for room: ring the producer's doorbell."""
    def arm_consumer(self) -> bool:
        """Announce sleep. False: there are records already, do not sleep."""
    def disarm_consumer(self) -> None: ...
