"""Copies contexts out of their pages, end to end, for libraries that read no pages of our size."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["block_table", "context_lens", "key_starts", "table_stride"]
)  # fmt: skip
def gather_pages(
    pages: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    keys: tl.tensor,  # [capacity, num_kv_heads, HEAD_DIM], written
    values: tl.tensor,  # as keys
    block_table: tl.tensor,  # int32 [num_seqs, table_stride]
    context_lens: tl.tensor,  # int32 [num_seqs]
    key_starts: tl.tensor,  # int32 [num_seqs]: where a context begins in keys
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # tokens of a program
    BLOCK_D: tl.constexpr,  # power of two >= HEAD_DIM
) -> None:
    start = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    seq = tl.program_id(2)
    context = tl.load(context_lens + seq)
    if start >= context:
        return
    places = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    blocks = tl.load(
        block_table + seq.to(tl.int64) * table_stride + places // BLOCK_SIZE,
        mask=places < context,
        other=0,
    )
    page = blocks.to(tl.int64) * block_stride + (places % BLOCK_SIZE) * HEAD_DIM
    source = pages + head.to(tl.int64) * head_stride + page[:, None] + dims[None, :]
    rows = (tl.load(key_starts + seq) + places).to(tl.int64) * tl.num_programs(1) + head
    target = rows[:, None] * HEAD_DIM + dims[None, :]
    held = (places[:, None] < context) & (dims[None, :] < HEAD_DIM)
    tl.store(keys + target, tl.load(source, mask=held), mask=held)
    tl.store(values + target, tl.load(source + value_stride, mask=held), mask=held)
