"""Decode attention: one query token per sequence, its context cut into splits that run in parallel.

A program takes all query heads of one K/V head over one split, so every page is read once. How long
a split is follows from the contexts that are on the device, by the same few vector operations in
every program: nothing is planned on the host and a captured graph fits whatever contexts it meets.
The program that finishes a sequence's last split merges them, in the order of the splits: the
result does not depend on who was last.
"""

import triton
import triton.language as tl

from nodeserve.model.gpu.attention.kernel_tiles import attend_tiles


@triton.jit
def tiles_of(
    context: tl.tensor, window: tl.tensor, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr
) -> tl.tensor:
    """First tile of keys that the last token of a context sees, and the tiles from there on."""
    first = context * 0
    if WINDOWED:
        first = tl.maximum(context - window, 0) // BLOCK_N
    return first, tl.cdiv(context, BLOCK_N) - first


@triton.jit
def split_tiles(
    num_tiles: tl.tensor, wave: tl.tensor, WAVES: tl.constexpr, FULL_TILES: tl.constexpr
) -> tl.tensor:
    """Tiles in a split of a step with `num_tiles`: enough splits to fill the device once, more
    (up to WAVES times) while they stay FULL_TILES long."""
    once = tl.cdiv(num_tiles, wave)
    return tl.maximum(tl.maximum(tl.minimum(once, FULL_TILES), tl.cdiv(num_tiles, wave * WAVES)), 1)


@triton.jit
def sequence_of(
    item: tl.tensor,
    context_lens: tl.tensor,
    num_seqs: tl.tensor,
    window: tl.tensor,
    wave: tl.tensor,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    NUM_SEQS_POW2: tl.constexpr,
    WAVES: tl.constexpr,
    FULL_TILES: tl.constexpr,
) -> tl.tensor:
    """The sequence that the step's split number `item` belongs to (num_seqs or more: to none), the
    number of that sequence's first split, and the tiles in a split."""
    seqs = tl.arange(0, NUM_SEQS_POW2)
    contexts = tl.load(context_lens + seqs, mask=seqs < num_seqs, other=0)
    _, tiles = tiles_of(contexts, window, BLOCK_N, WINDOWED)
    size = split_tiles(tl.sum(tiles), wave, WAVES, FULL_TILES)
    splits = tl.where(seqs < num_seqs, tl.maximum(tl.cdiv(tiles, size), 1), 0)
    ends = tl.cumsum(splits, 0)
    seq = tl.sum((ends <= item).to(tl.int32))
    return seq, tl.sum(tl.where(ends <= item, splits, 0)), size


# These differ from step to step: to compile again for one that happens to be 1 or a multiple of 16
# would stall a step and gain nothing.
@triton.jit(
    do_not_specialize=[
        "block_table", "context_lens", "num_seqs", "table_stride", "window", "wave"
    ]
)  # fmt: skip
def paged_decode(
    query: tl.tensor,  # [num_seqs, num_kv_heads * GROUP, HEAD_DIM]
    pages: tl.tensor,  # [num_blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    out: tl.tensor,  # as query
    partials: tl.tensor,  # float32 [items * num_kv_heads, GROUP, HEAD_DIM]: sums of weighted values
    stats: tl.tensor,  # float32 [items * num_kv_heads, GROUP, 2]: maximum and sum of the weights
    arrivals: tl.tensor,  # int32 [num_seqs * num_kv_heads]: finished splits, zero between launches
    block_table: tl.tensor,  # int32 [num_seqs, table_stride]
    context_lens: tl.tensor,  # int32 [num_seqs]
    num_seqs: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    value_stride: tl.tensor,
    head_stride: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e)
    window: tl.tensor,  # tokens, itself included; read if WINDOWED
    wave: tl.tensor,  # splits of all sequences that fill the device once, per K/V head
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # power of two >= GROUP, 16 at least
    BLOCK_N: tl.constexpr,  # keys in a tile
    BLOCK_D: tl.constexpr,  # power of two >= HEAD_DIM
    NUM_SEQS_POW2: tl.constexpr,  # >= num_seqs
    GROUP_POW2: tl.constexpr,
    MERGE: tl.constexpr,  # splits merged at a time
    WAVES: tl.constexpr,
    FULL_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)

    seq, first_item, size = sequence_of(
        item, context_lens, num_seqs, window, wave, BLOCK_N, WINDOWED, NUM_SEQS_POW2, WAVES,
        FULL_TILES,
    )  # fmt: skip
    if seq >= num_seqs:
        return
    context = tl.load(context_lens + seq)
    first_tile, num_tiles = tiles_of(context, window, BLOCK_N, WINDOWED)
    num_splits = tl.maximum(tl.cdiv(num_tiles, size), 1)
    split = item - first_item
    begin = (first_tile + split * num_tiles // num_splits) * BLOCK_N
    end = (first_tile + (split + 1) * num_tiles // num_splits) * BLOCK_N

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    inside = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    own = kv_head * GROUP * HEAD_DIM
    q = tl.load(query + seq.to(tl.int64) * query_stride + own + offsets, mask=inside, other=0.0)
    table = block_table + seq.to(tl.int64) * table_stride
    head_pages = pages + kv_head.to(tl.int64) * head_stride

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Every row is the context's last token. A tile's end is known, so one loop with masks will do.
    last_seen = tl.full([BLOCK_M], 0, tl.int32) + context - 1
    highest, total, values = attend_tiles(
        q, highest, total, values, begin, tl.minimum(end, context), last_seen, head_pages, table,
        block_stride, value_stride, scale, window, True, WINDOWED, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        BLOCK_D, PRECISION,
    )  # fmt: skip

    out_at = out + seq.to(tl.int64) * out_stride + own
    if num_splits == 1:
        # A context of 0 has no tile: nothing was summed and the row is 0, not NaN.
        result = values / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_at + offsets, result.to(out.dtype.element_ty), mask=inside)
        return

    place = (item * num_kv_heads + kv_head) * GROUP
    tl.store(partials + place * HEAD_DIM + offsets, values, mask=inside)
    tl.store(stats + (place + rows) * 2, highest, mask=rows < GROUP)
    tl.store(stats + (place + rows) * 2 + 1, total, mask=rows < GROUP)
    # One thread counts for all: what the others stored has to be ordered before its release.
    tl.debug_barrier()
    counter = arrivals + seq * num_kv_heads + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") != num_splits - 1:
        return
    tl.store(counter, 0)
    merge_splits(
        out_at, partials, stats, first_item * num_kv_heads + kv_head, num_splits, num_kv_heads,
        0, GROUP, GROUP_POW2, HEAD_DIM, BLOCK_D, MERGE,
    )  # fmt: skip


@triton.jit
def merge_splits(
    out_at: tl.tensor,
    partials: tl.tensor,
    stats: tl.tensor,
    first: tl.tensor,  # of the sequence's splits, this head's
    num_splits: tl.tensor,
    stride: tl.tensor,  # from one split to the next
    FIRST_ROW: tl.constexpr,  # of the group's rows: GROUP_POW2 of them are merged
    GROUP: tl.constexpr,
    GROUP_POW2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE: tl.constexpr,
) -> None:
    """Add up a sequence's splits for one K/V head; their loads go past the first-level cache."""
    rows = FIRST_ROW + tl.arange(0, GROUP_POW2)
    dims = tl.arange(0, BLOCK_D)
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    inside = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    highest = tl.full([GROUP_POW2], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_POW2], tl.float32)
    values = tl.zeros([GROUP_POW2, BLOCK_D], tl.float32)
    for start in range(0, num_splits, MERGE):
        splits = start + tl.arange(0, MERGE)
        places = (first + splits * stride) * GROUP
        held = (splits[:, None] < num_splits) & (rows[None, :] < GROUP)
        stat_at = stats + (places[:, None] + rows[None, :]) * 2
        part_highest = tl.load(stat_at, mask=held, other=-float("inf"), cache_modifier=".cg")
        part_total = tl.load(stat_at + 1, mask=held, other=0.0, cache_modifier=".cg")
        part_values = tl.load(
            partials + places[:, None, None] * HEAD_DIM + offsets[None, :, :],
            mask=(splits[:, None, None] < num_splits) & inside[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(part_highest, 0))
        higher = tl.where(rows < GROUP, higher, 0.0)  # padding rows have no finite maximum
        weights = tl.exp2(part_highest - higher[None, :])
        decay = tl.exp2(highest - higher)
        total = total * decay + tl.sum(part_total * weights, 0)
        values = values * decay[:, None] + tl.sum(part_values * weights[:, :, None], 0)
        highest = higher
    result = values / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_at + offsets, result.to(out_at.dtype.element_ty), mask=inside)
