"""The inner loop of both kernels: tiles of keys, gathered from their pages, into a running softmax.

Page numbers are loads that the loads of K and V wait for. The compiler pipelines both, so that
nothing here waits: see `tiles.py` for how far ahead.
"""

import triton
import triton.language as tl


@triton.jit
def attend_tiles(
    q: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    values: tl.tensor,
    begin: tl.tensor,  # first key, a multiple of BLOCK_N
    end: tl.tensor,  # past the last key
    last_seen: tl.tensor,  # [BLOCK_M] the key at each row's own position
    head_pages: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    value_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Take the keys from `begin` to `end` into the running softmax."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        if BLOCK_SIZE % BLOCK_N == 0:  # the whole tile is in one page
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            page = block * block_stride + (places % BLOCK_SIZE) * HEAD_DIM
        elif MASKED:
            blocks = tl.load(table + places // BLOCK_SIZE, mask=places < end, other=0)
            page = blocks.to(tl.int64) * block_stride + (places % BLOCK_SIZE) * HEAD_DIM
        else:
            blocks = tl.load(table + places // BLOCK_SIZE)
            page = blocks.to(tl.int64) * block_stride + (places % BLOCK_SIZE) * HEAD_DIM
        keys_at = head_pages + page[:, None] + dims[None, :]
        values_at = keys_at + value_stride
        if MASKED:
            held = (places[:, None] < end) & (dims[None, :] < HEAD_DIM)
            k = tl.load(keys_at, mask=held, other=0.0)
            v = tl.load(values_at, mask=held, other=0.0)
        elif HEAD_DIM < BLOCK_D:
            k = tl.load(keys_at, mask=dims[None, :] < HEAD_DIM, other=0.0)
            v = tl.load(values_at, mask=dims[None, :] < HEAD_DIM, other=0.0)
        else:
            k = tl.load(keys_at)
            v = tl.load(values_at)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = places[None, :] <= last_seen[:, None]
            if WINDOWED:
                seen = seen & (places[None, :] > last_seen[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        shift = higher
        if MASKED and WINDOWED:
            # A row may have seen nothing yet: a shift of -inf would make NaN of it.
            shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, 1)
        values = tl.dot(weights.to(v.dtype), v, values * decay[:, None], input_precision=PRECISION)
        highest = higher
    return highest, total, values
