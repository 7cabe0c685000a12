"""The C++ host extension: shared-memory rings, collectives and CPU kernels. No CUDA, no torch."""

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

# ---- group (csrc/group)

def meeting_bytes(size: int, slot_bytes: int) -> int:
    """What `Meeting` needs for `size` members and parts of `slot_bytes`, a multiple of 64."""

class Meeting:
    """Collectives of processes that map the same memory; csrc/group/meeting.h has the protocol.

    All members make the same calls in the same order. Addresses are of contiguous memory.
    RuntimeError when a member does not come within `timeout_s`. Calls release the GIL.
    """

    def __init__(self, memory: Buffer, rank: int, size: int, timeout_s: float) -> None:
        """`memory` is zero before the first member opens it."""
    def all_reduce(self, x: int, count: int) -> None:
        """`count` float32 at x become the sum of everybody's, added in the order of ranks."""
    def gather(self, x: int, num_bytes: int, out: int) -> None:
        """Everybody's bytes at x, one behind the other, to `out`; 0 but on rank 0."""
    def all_to_all(self, x: int, given: Sequence[int], out: int, taken: Sequence[int]) -> None:
        """The next given[r] bytes of x to each r; of out the next taken[r] from each.

        ValueError where a member gives another number than is taken."""

def pipe_bytes(room_bytes: int) -> int:
    """What `Pipe` needs for so many bytes under way, a multiple of 64; each message takes them
    rounded up, and 64 more."""

class Pipe:
    """One end of a way for messages between two processes that map the same memory: one of them
    sends, the other receives. csrc/group/pipe.h has the protocol.

    Addresses are of contiguous memory. RuntimeError when the other end does nothing for
    `timeout_s`. Calls release the GIL.
    """

    def __init__(self, memory: Buffer, timeout_s: float) -> None:
        """`memory` is zero before the first end opens it."""
    def send(self, x: int, num_bytes: int) -> None:
        """Waits only while there is no room."""
    def receive(self, out: int, num_bytes: int) -> None:
        """ValueError where the message has another length."""

# ---- cpu (csrc/cpu)
#
# Addresses are of memory the caller keeps alive; 0 stands for "none" where
# a weight is optional. Bad arguments raise ValueError, the message begins with the argument's name.

class CpuEngine:
    def __init__(self, num_threads: int = 1, cpus: Sequence[int] = (), isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def busy_seconds(self) -> float: ...
    def quantised_rows(self, dtype: str) -> int:
        """Up to how many rows a linear reads its quantised weight; 0 where none is read."""

class CpuLinear:
    def __init__(
        self,
        engine: CpuEngine,
        dtype: str,
        weight: int,
        bias: int,
        n: int,
        k: int,
        epilogue: str,
        storage: str = "none",
        quantised: int = 0,
        zero: float = 0.0,
    ) -> None: ...
    def __call__(self, x: int, out: int, rows: int) -> None: ...

class CpuRmsNorm:
    def __init__(
        self, engine: CpuEngine, dtype: str, weight: int, width: int, eps: float
    ) -> None: ...
    def __call__(self, x: int, out: int, rows: int) -> None: ...

class CpuEmbedding:
    def __init__(
        self, engine: CpuEngine, dtype: str, table: int, vocab_size: int, width: int
    ) -> None: ...
    def __call__(self, token_ids: int, out: int, rows: int) -> None: ...

class CpuPages:
    def __init__(
        self,
        pool: Buffer,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: str,
    ) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...

class CpuPlan:
    def __init__(self) -> None: ...
    def prepare(
        self,
        engine: CpuEngine,
        pages: CpuPages,
        num_heads: int,
        positions: int,
        query_starts: int,
        context_lens: int,
        block_table: int,
        num_tokens: int,
        num_seqs: int,
        max_blocks: int,
    ) -> None: ...

class CpuAttention:
    def __init__(
        self,
        engine: CpuEngine,
        dtype: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        cos: int,
        sin: int,
        max_position: int,
        q_norm: int,
        k_norm: int,
        norm_eps: float,
    ) -> None: ...
    def store(self, plan: CpuPlan, layer: int, qkv: int, query: int) -> None: ...
    def attend(self, plan: CpuPlan, layer: int, query: int, out: int) -> None: ...

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def cpu_packed_bytes(dtype: str, n: int, k: int, epilogue: str) -> int: ...
def cpu_quantised_bytes(storage: str, n: int, k: int, epilogue: str) -> int: ...
def cpu_pack(
    engine: CpuEngine, dtype: str, weight: int, out: int, n: int, k: int, epilogue: str
) -> None: ...
def cpu_pack_quantised(
    engine: CpuEngine,
    dtype: str,
    storage: str,
    q: int,
    scale: int,
    low: int,
    out: int,
    n: int,
    k: int,
    epilogue: str,
) -> None:
    """Integers of a byte each [n, k], and per 32 of them scale and low [n, k / 32] float32."""

def cpu_read(engine: CpuEngine, address: int, num_bytes: int) -> None:
    """Read every byte once, on all threads: the memory ceiling of a benchmark."""

def copy_blocks(
    dst: Buffer,
    src: Buffer,
    dst_block_bytes: int,
    src_block_bytes: int,
    runs: Sequence[tuple[int, int, int]],
    dst_ids: Sequence[int],
    src_ids: Sequence[int],
) -> None:
    """runs: an offset in the target block, one in the source block, and bytes."""
