"""Prefill attention: chunks of prompts, causal, over pages that hold their contexts.

A program takes a tile of query positions with all query heads of one K/V head: rows of the tile are
(position, head) pairs, so a page that was read serves the whole group and little of a tile lies
beyond the diagonal. Tiles of keys that every row sees are walked without masks; only those at the
diagonal and at the window's edge pay for them.
"""

import triton
import triton.language as tl

from nodeserve.model.gpu.attention.kernel_tiles import attend_tiles


@triton.jit
def sequence_of(
    item: tl.tensor,
    query_starts: tl.tensor,
    num_seqs: tl.tensor,
    BLOCK_Q: tl.constexpr,
    NUM_SEQS_POW2: tl.constexpr,
) -> tl.tensor:
    """The sequence that the step's tile number `item` belongs to (num_seqs or more: to none), and
    the number of that sequence's first tile."""
    seqs = tl.arange(0, NUM_SEQS_POW2)
    starts = tl.load(query_starts + seqs, mask=seqs < num_seqs, other=0)
    stops = tl.load(query_starts + seqs + 1, mask=seqs < num_seqs, other=0)
    tiles = tl.cdiv(stops - starts, BLOCK_Q)
    ends = tl.cumsum(tiles, 0)
    seq = tl.sum((ends <= item).to(tl.int32))
    return seq, tl.sum(tl.where(ends <= item, tiles, 0))


# These differ from step to step: to compile again for one that happens to be 1 or a multiple of 16
# would stall a step and gain nothing.
@triton.jit(
    do_not_specialize=[
        "query_starts", "context_lens", "block_table", "num_seqs", "table_stride", "window"
    ]
)  # fmt: skip
def paged_prefill(
    query: tl.tensor,  # [num_tokens, num_kv_heads * GROUP, HEAD_DIM]
    pages: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    out: tl.tensor,  # as query
    query_starts: tl.tensor,  # int32 [num_seqs + 1]: rows of query
    context_lens: tl.tensor,  # int32 [num_seqs]
    block_table: tl.tensor,  # int32 [num_seqs, table_stride]
    num_seqs: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e)
    window: tl.tensor,  # tokens, itself included; read if WINDOWED
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows in a tile: BLOCK_M // GROUP positions
    BLOCK_N: tl.constexpr,  # keys in a tile
    BLOCK_D: tl.constexpr,  # power of two >= HEAD_DIM
    NUM_SEQS_POW2: tl.constexpr,  # >= num_seqs
    PRECISION: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP

    seq, first_item = sequence_of(item, query_starts, num_seqs, BLOCK_Q, NUM_SEQS_POW2)
    if seq >= num_seqs:
        return
    first_row = tl.load(query_starts + seq)
    num_rows = tl.load(query_starts + seq + 1) - first_row
    # The last tiles see the most keys: they start first.
    tile = tl.cdiv(num_rows, BLOCK_Q) - 1 - (item - first_item)
    before = tl.load(context_lens + seq) - num_rows  # tokens of the context before the chunk

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    position = tile * BLOCK_Q + rows // GROUP  # in the chunk
    inside = (rows < BLOCK_Q * GROUP) & (position < num_rows)
    inside = inside[:, None] & (dims[None, :] < HEAD_DIM)
    heads = (kv_head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    row = (first_row + position).to(tl.int64)[:, None]
    q = tl.load(query + row * query_stride + heads, mask=inside, other=0.0)
    table = block_table + seq.to(tl.int64) * table_stride
    head_pages = pages + kv_head.to(tl.int64) * head_stride

    first_position = before + tile * BLOCK_Q
    end = tl.minimum(first_position + BLOCK_Q, before + num_rows)
    full_end = (first_position + 1) // BLOCK_N * BLOCK_N  # keys below it: seen by every row
    begin = 0
    if WINDOWED:
        begin = tl.maximum(first_position + 1 - window, 0) // BLOCK_N * BLOCK_N
        full_end = tl.maximum(full_end, begin)
    last_seen = before + position

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOWED:  # keys that only the first rows of the tile still see
        edge = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(edge, full_end)
        highest, total, values = attend_tiles(
            q, highest, total, values, begin, edge, last_seen, head_pages, table, block_stride,
            value_stride, scale, window, True, WINDOWED, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
            PRECISION,
        )  # fmt: skip
        begin = tl.maximum(edge, begin)
    highest, total, values = attend_tiles(
        q, highest, total, values, begin, full_end, last_seen, head_pages, table, block_stride,
        value_stride, scale, window, False, WINDOWED, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        PRECISION,
    )  # fmt: skip
    highest, total, values = attend_tiles(
        q, highest, total, values, full_end, end, last_seen, head_pages, table, block_stride,
        value_stride, scale, window, True, WINDOWED, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        PRECISION,
    )  # fmt: skip
    result = values / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row * out_stride + heads, result.to(out.dtype.element_ty), mask=inside)
