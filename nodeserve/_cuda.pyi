"""The CUDA extension: page pools, streams, events and page copies. No torch.

It is built where nvcc is found (`nodeserve.cuda_build` says why it was not), and imports on a
machine without a GPU or driver: there every call raises CudaError with CUDA's words.

Devices count from 0 among those this process sees. A stream is a cudaStream_t as a number, the same
that `torch.cuda.Stream.cuda_stream` gives; 0 is the default stream. There are two errors, both of
nodeserve.errors: BadArgument (a ValueError) for what no call could take, before any work is
started, and CudaError. An object is used by one thread at a time; after `close` everything but
another `close` is a BadArgument. Blocking calls give the GIL away.
"""

from typing import final

from typing_extensions import Buffer

from nodeserve.errors import CudaError as CudaError

def device_count() -> int: ...
def can_access_peer(device: int, peer: int) -> bool:
    """Whether `device` reads and writes `peer`'s memory directly; True for itself."""

def memory(device: int) -> tuple[int, int]:
    """Free and total bytes of the device, whoever uses them."""

@final
class Pool:
    """Zeroed device memory in an allocation of its own, so that a handle exports nothing else.

    `close` first waits for all work of the device.
    """

    def __init__(self, device: int, num_bytes: int) -> None:
        """num_bytes: a multiple of 16."""
    @property
    def device(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def handle(self) -> bytes:
        """64 bytes for another process's PeerPool; this process cannot open them itself."""
    def close(self) -> None: ...

@final
class PeerPool:
    """Another process's pool. Its owner keeps it alive until this one is closed."""

    def __init__(self, device: int, handle: bytes, num_bytes: int) -> None:
        """device: our own, which will do the copying. num_bytes: what the owner says it has."""
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def close(self) -> None: ...

@final
class HostPages:
    """Host memory of the caller, pinned for all devices. Unmap it after `close`."""

    def __init__(self, address: int, num_bytes: int, device: int = 0) -> None:
        """address: the start of a mapping, a multiple of 4096. num_bytes: a multiple of 16."""
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int:
        """What devices call it."""
    def close(self) -> None: ...

@final
class Stream:
    """A stream that does not wait for the default stream."""

    def __init__(self, device: int, high_priority: bool = False) -> None: ...
    @property
    def handle(self) -> int: ...
    def synchronize(self) -> None: ...
    def close(self) -> None:
        """Work that was put on it still runs to its end."""

@final
class Event:
    """A point in a stream's work; before its first record it counts as done.

    The owner of an interprocess event keeps it until no peer uses it any more.
    """

    def __init__(self, device: int, *, interprocess: bool = False, timed: bool = False) -> None:
        """At most one of the two: CUDA times no interprocess events."""
    @staticmethod
    def open(device: int, handle: bytes) -> Event:
        """A peer's interprocess event; it cannot be exported again."""
    def handle(self) -> bytes:
        """64 bytes for another process's `open`."""
    def record(self, stream: int) -> None: ...
    def make_wait(self, stream: int) -> None:
        """Later work of the stream waits for the last record made so far; the caller does not."""
    def done(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_ms(self, earlier: Event) -> float:
        """Both timed, recorded and done."""
    def close(self) -> None: ...

def copy_pages(
    target: int,
    target_bytes: int,
    source: int,
    source_bytes: int,
    pairs: Buffer,
    runs: Buffer,
    *,
    target_stride: int,
    source_stride: int,
    stream: int,
    method: str = "auto",
    max_thread_blocks: int = 0,
) -> int:
    """Copy every run of every pair of blocks; return how many launches or batch calls it took.

    pairs: [n, 2] int32, (target block, source block). runs: [m, 3] int64, (target offset, source
    offset, bytes) inside a block; for equal shards one run of a whole block. The two strides are
    the bytes of a block; the two lengths are whole blocks. Addresses, strides, offsets and bytes
    are multiples of 16; no target byte is written twice, and none is read by the same request.
    Both buffers may be changed as soon as the call returns.

    Memory is of the stream's device, of a peer it has access to, or pinned host memory.
    method: "kernel" (one launch up to some 4,000 pairs), "batch" (one call of the copy engines; not
    on the default stream), "auto" (batch for whole blocks that come from or go to somewhere else
    than the stream's device). max_thread_blocks: how many thread blocks the kernel may have; 0: a
    quarter of the device's multiprocessors, half of them where both sides are in its memory.
    """
