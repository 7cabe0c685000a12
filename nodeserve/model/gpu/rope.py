"""From a step's q, k and v to rotated queries and filled pages, in one kernel.

A pair is (i, i + head_dim / 2) of a head, turned by the angle of its position, as the hub's
checkpoints want it. Pages of a layer are a view [num_blocks, 2, num_kv_heads, block_size, head_dim]
of the pool, contiguous but for the stride from block to block.
"""

import torch
import triton
import triton.language as tl

SLOT_TILE = 512
_PAIRS = 1024  # that a program turns


@triton.jit(
    do_not_specialize=["width"],
    do_not_specialize_on_alignment=["query_starts", "positions", "block_table", "slots"],
)
def slots_kernel(
    query_starts: tl.tensor,  # [num_seqs + 1] int32
    positions: tl.tensor,  # [num_tokens] int32
    block_table: tl.tensor,  # [num_seqs, width] int32
    slots: tl.tensor,  # [num_tokens] int32, written
    width: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    seq = tl.program_id(0)
    row = tl.load(query_starts + seq) + tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = row < tl.load(query_starts + seq + 1)
    position = tl.load(positions + row, mask=inside, other=0)
    block = tl.load(block_table + seq * width + position // BLOCK_SIZE, mask=inside, other=-1)
    slot = tl.where(block < 0, -1, block * BLOCK_SIZE + position % BLOCK_SIZE)
    tl.store(slots + row, slot, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rope_store_kernel(
    qkv: tl.tensor,  # [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    positions: tl.tensor,  # [num_tokens] int32
    slots: tl.tensor,  # [num_tokens] int32; below 0: K and V go nowhere
    cos: tl.tensor,  # [max_position, HEAD_DIM / 2] float32
    sin: tl.tensor,
    q_norm: tl.tensor,  # [HEAD_DIM] float32
    k_norm: tl.tensor,
    query: tl.tensor,  # [num_tokens, NUM_HEADS * HEAD_DIM] act, written
    pages: tl.tensor,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM] act, written
    block_stride: tl.tensor,  # values from one block to the next
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QK_NORM: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program, q, k and v counted through
    HALF: tl.constexpr,  # HEAD_DIM / 2 up to a power of two
) -> None:
    half_dim: tl.constexpr = HEAD_DIM // 2
    num_all: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    inside = (head < num_all) & (lane < half_dim)
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS

    source = qkv + token * num_all * HEAD_DIM + head * HEAD_DIM + lane
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half_dim, mask=inside, other=0.0).to(tl.float32)
    left, right = first, second
    if QK_NORM:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        of_query = is_query & (lane < half_dim)
        of_key = (is_query == 0) & (lane < half_dim)
        weight = tl.load(q_norm + lane + head * 0, mask=of_query, other=0.0)
        weight += tl.load(k_norm + lane + head * 0, mask=of_key, other=0.0)
        left = first * scale * weight
        weight = tl.load(q_norm + half_dim + lane + head * 0, mask=of_query, other=0.0)
        weight += tl.load(k_norm + half_dim + lane + head * 0, mask=of_key, other=0.0)
        right = second * scale * weight

    angle = tl.load(positions + token).to(tl.int64) * half_dim + lane
    c = tl.load(cos + angle, mask=lane < half_dim, other=0.0)
    s = tl.load(sin + angle, mask=lane < half_dim, other=0.0)
    turned_first = tl.where(is_value, first, left * c - right * s).to(query.dtype.element_ty)
    turned_second = tl.where(is_value, second, right * c + left * s).to(query.dtype.element_ty)

    target = query + token * NUM_HEADS * HEAD_DIM + head * HEAD_DIM + lane
    tl.store(target, turned_first, mask=inside & is_query)
    tl.store(target + half_dim, turned_second, mask=inside & is_query)

    slot = tl.load(slots + token)
    # K heads, then V heads: the order of both q, k, v and of the pages.
    page = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
    target = pages + page + (head - NUM_HEADS) * BLOCK_SIZE * HEAD_DIM + lane
    kept = inside & (is_query == 0) & (slot >= 0)
    tl.store(target, turned_first, mask=kept)
    tl.store(target + half_dim, turned_second, mask=kept)


def find_slots(
    query_starts: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    max_query_len: int,
    block_size: int,
) -> None:
    """slots [num_tokens] int32 = block * block_size + place in it, -1 where the table has a pad."""
    num_seqs, width = block_table.shape
    slots_kernel[(num_seqs, triton.cdiv(max_query_len, SLOT_TILE))](
        query_starts, positions, block_table, slots, width, BLOCK_SIZE=block_size, TILE=SLOT_TILE
    )


def rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None,
    query: torch.Tensor,
    pages: torch.Tensor,
    eps: float,
) -> None:
    """Shapes as in the kernel; tables are cos and sin, qk_norms the weights for q and k."""
    _, _, num_kv_heads, block_size, head_dim = pages.shape
    num_heads = query.size(1) // head_dim
    num_all = num_heads + 2 * num_kv_heads
    half = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(num_all), max(_PAIRS // half, 1))
    q_norm, k_norm = qk_norms or tables
    rope_store_kernel[(qkv.size(0), triton.cdiv(num_all, heads))](
        qkv,
        positions,
        slots,
        *tables,
        q_norm,
        k_norm,
        query,
        pages,
        pages.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QK_NORM=qk_norms is not None,
        HEADS=heads,
        HALF=half,
    )
