"""Attention over latents (MLA): all query heads read one latent a token, as its key and its value.

A key is a latent and a rotated part behind it; its value is the latent alone. So a tile is loaded
once, scored with both parts of the queries and summed up by its first part. A program takes a
block of heads. The rest is as in `kernel_decode` and `kernel_prefill`: splits that the device finds
by itself, tiles of (position, head) rows. Only here every tile is masked: a loop of its own for
those without a mask would save one instruction in fifteen, but pipelines would fill twice and
registers spill.
"""

import triton
import triton.language as tl

from nodeserve.model.gpu.attention import kernel_decode, kernel_prefill
from nodeserve.model.gpu.attention.kernel_decode import merge_splits, tiles_of


@triton.jit
def attend_latents(
    q: tl.tensor,  # [BLOCK_M, BLOCK_R]
    q_turned: tl.tensor,  # [BLOCK_M, BLOCK_T]
    highest: tl.tensor,
    total: tl.tensor,
    values: tl.tensor,  # [BLOCK_M, BLOCK_R]
    begin: tl.tensor,  # first key, a multiple of BLOCK_N
    end: tl.tensor,  # past the last key
    last_seen: tl.tensor,  # [BLOCK_M] the key at each row's own position
    pages: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    scale: tl.tensor,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Take the keys from `begin` to `end` into the running softmax."""
    dims, turned = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    for start in range(begin, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        held = places < end
        blocks = tl.load(table + places // BLOCK_SIZE, mask=held, other=0)
        page = blocks.to(tl.int64) * block_stride + (places % BLOCK_SIZE) * (RANK + TURNED)
        at = pages + page[:, None]
        k = tl.load(at + dims[None, :], mask=held[:, None] & (dims[None, :] < RANK), other=0.0)
        k_turned = tl.load(
            at + RANK + turned[None, :],
            mask=held[:, None] & (turned[None, :] < TURNED),
            other=0.0,
        )
        scores = tl.dot(q_turned, tl.trans(k_turned), input_precision=PRECISION)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        scores = tl.where(places[None, :] <= last_seen[:, None], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        decay = tl.exp2(highest - higher)
        total = total * decay + tl.sum(weights, 1)
        values = tl.dot(weights.to(k.dtype), k, values * decay[:, None], input_precision=PRECISION)
        highest = higher
    return highest, total, values


@triton.jit(do_not_specialize=["block_table", "context_lens", "num_seqs", "table_stride", "wave"])
def latent_decode(
    query: tl.tensor,  # [num_seqs, blocks of heads * GROUP, RANK + TURNED]
    pages: tl.tensor,  # [num_blocks, BLOCK_SIZE, RANK + TURNED], strided
    out: tl.tensor,  # [num_seqs, blocks of heads * GROUP, RANK]
    partials: tl.tensor,  # float32 [items * blocks of heads, GROUP, RANK]: weighted values
    stats: tl.tensor,  # float32 [items * blocks of heads, GROUP, 2]: maximum and sum of weights
    arrivals: tl.tensor,  # int32 [num_seqs * blocks of heads]: splits done, zero between launches
    block_table: tl.tensor,  # int32 [num_seqs, table_stride]
    context_lens: tl.tensor,  # int32 [num_seqs]
    num_seqs: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e)
    wave: tl.tensor,  # splits of all sequences that fill the device once, per block of heads
    GROUP: tl.constexpr,  # heads in a block
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # power of two >= GROUP, 16 at least
    BLOCK_N: tl.constexpr,  # keys in a tile
    BLOCK_R: tl.constexpr,  # power of two >= RANK
    BLOCK_T: tl.constexpr,  # power of two >= TURNED, 16 at least
    NUM_SEQS_POW2: tl.constexpr,  # >= num_seqs
    MERGE_ROWS: tl.constexpr,  # merged at a time, a power of two
    MERGE: tl.constexpr,  # splits merged at a time
    WAVES: tl.constexpr,
    FULL_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One query token per sequence, its context cut into splits; the last one done merges them."""
    head_block = tl.program_id(0)
    item = tl.program_id(1)
    num_head_blocks = tl.num_programs(0)

    seq, first_item, size = kernel_decode.sequence_of(
        item, context_lens, num_seqs, 0, wave, BLOCK_N, False, NUM_SEQS_POW2, WAVES, FULL_TILES
    )
    if seq >= num_seqs:
        return
    context = tl.load(context_lens + seq)
    _, num_tiles = tiles_of(context, 0, BLOCK_N, False)
    num_splits = tl.maximum(tl.cdiv(num_tiles, size), 1)
    split = item - first_item
    begin = split * num_tiles // num_splits * BLOCK_N
    end = (split + 1) * num_tiles // num_splits * BLOCK_N

    rows = tl.arange(0, BLOCK_M)
    dims, turned = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    own_rows = rows[:, None] < GROUP
    inside = own_rows & (dims[None, :] < RANK)
    row = query + seq.to(tl.int64) * query_stride
    row = row + (head_block * GROUP + rows)[:, None] * (RANK + TURNED)
    q = tl.load(row + dims[None, :], mask=inside, other=0.0)
    in_turned = own_rows & (turned[None, :] < TURNED)
    q_turned = tl.load(row + RANK + turned[None, :], mask=in_turned, other=0.0)

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    last_seen = tl.full([BLOCK_M], 0, tl.int32) + context - 1
    highest, total, values = attend_latents(
        q, q_turned, highest, total, values, begin, tl.minimum(end, context), last_seen, pages,
        block_table + seq.to(tl.int64) * table_stride, block_stride, scale, RANK, TURNED,
        BLOCK_SIZE, BLOCK_N, BLOCK_R, BLOCK_T, PRECISION,
    )  # fmt: skip

    offsets = rows[:, None] * RANK + dims[None, :]
    out_at = out + seq.to(tl.int64) * out_stride + head_block * GROUP * RANK
    if num_splits == 1:
        # A context of 0 has no tile: nothing was summed and the row is 0, not NaN.
        result = values / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_at + offsets, result.to(out.dtype.element_ty), mask=inside)
        return

    place = (item * num_head_blocks + head_block) * GROUP
    tl.store(partials + place.to(tl.int64) * RANK + offsets, values, mask=inside)
    tl.store(stats + (place + rows) * 2, highest, mask=rows < GROUP)
    tl.store(stats + (place + rows) * 2 + 1, total, mask=rows < GROUP)
    # One thread counts for all: what the others stored has to be ordered before its release.
    tl.debug_barrier()
    counter = arrivals + seq * num_head_blocks + head_block
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") != num_splits - 1:
        return
    tl.store(counter, 0)
    for first_row in tl.static_range(0, GROUP, MERGE_ROWS):
        merge_splits(
            out_at, partials, stats, first_item * num_head_blocks + head_block, num_splits,
            num_head_blocks, first_row, GROUP, MERGE_ROWS, RANK, BLOCK_R, MERGE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "query_starts", "context_lens", "block_table", "num_seqs", "table_stride"
    ]
)  # fmt: skip
def latent_prefill(
    query: tl.tensor,  # [num_tokens, blocks of heads * GROUP, RANK + TURNED]
    pages: tl.tensor,  # [num_blocks, BLOCK_SIZE, RANK + TURNED], strided
    out: tl.tensor,  # [num_tokens, blocks of heads * GROUP, RANK]
    query_starts: tl.tensor,  # int32 [num_seqs + 1]: rows of query
    context_lens: tl.tensor,  # int32 [num_seqs]
    block_table: tl.tensor,  # int32 [num_seqs, table_stride]
    num_seqs: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e)
    GROUP: tl.constexpr,  # heads in a block
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows in a tile: BLOCK_M // GROUP positions
    BLOCK_N: tl.constexpr,  # keys in a tile
    BLOCK_R: tl.constexpr,  # power of two >= RANK
    BLOCK_T: tl.constexpr,  # power of two >= TURNED, 16 at least
    NUM_SEQS_POW2: tl.constexpr,  # >= num_seqs
    PRECISION: tl.constexpr,
) -> None:
    """Chunks of prompts, causal, over pages that hold their contexts."""
    head_block = tl.program_id(0)
    item = tl.program_id(1)
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP

    seq, first_item = kernel_prefill.sequence_of(
        item, query_starts, num_seqs, BLOCK_Q, NUM_SEQS_POW2
    )
    if seq >= num_seqs:
        return
    first_row = tl.load(query_starts + seq)
    num_rows = tl.load(query_starts + seq + 1) - first_row
    # The last tiles see the most keys: they start first.
    tile = tl.cdiv(num_rows, BLOCK_Q) - 1 - (item - first_item)
    before = tl.load(context_lens + seq) - num_rows  # tokens of the context before the chunk

    rows = tl.arange(0, BLOCK_M)
    dims, turned = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    position = tile * BLOCK_Q + rows // GROUP  # in the chunk
    own_rows = ((rows < BLOCK_Q * GROUP) & (position < num_rows))[:, None]
    inside = own_rows & (dims[None, :] < RANK)
    head = (head_block * GROUP + rows % GROUP)[:, None]
    row = (first_row + position).to(tl.int64)[:, None]
    query_at = query + row * query_stride + head * (RANK + TURNED)
    q = tl.load(query_at + dims[None, :], mask=inside, other=0.0)
    in_turned = own_rows & (turned[None, :] < TURNED)
    q_turned = tl.load(query_at + RANK + turned[None, :], mask=in_turned, other=0.0)
    table = block_table + seq.to(tl.int64) * table_stride

    first_position = before + tile * BLOCK_Q
    end = tl.minimum(first_position + BLOCK_Q, before + num_rows)
    last_seen = before + position

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    highest, total, values = attend_latents(
        q, q_turned, highest, total, values, 0, end, last_seen, pages, table, block_stride, scale,
        RANK, TURNED, BLOCK_SIZE, BLOCK_N, BLOCK_R, BLOCK_T, PRECISION,
    )  # fmt: skip
    result = values / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out + row * out_stride + head * RANK + dims[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=inside)
