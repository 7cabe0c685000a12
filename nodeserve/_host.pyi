from collections.abc import Sequence

from typing_extensions import Buffer

# CPU kernels (csrc/cpu). Addresses are of memory the caller keeps alive; 0 stands for "none" where
# a weight is optional. Bad arguments raise ValueError, the message begins with the argument's name.

class CpuEngine:
    def __init__(self, num_threads: int = 1, cpus: Sequence[int] = (), isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def busy_seconds(self) -> float: ...

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
def cpu_pack(
    engine: CpuEngine, dtype: str, weight: int, out: int, n: int, k: int, epilogue: str
) -> None: ...
def copy_blocks(
    dst: Buffer, src: Buffer, block_bytes: int, dst_ids: Sequence[int], src_ids: Sequence[int]
) -> None: ...
