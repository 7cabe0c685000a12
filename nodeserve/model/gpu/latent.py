"""Latent attention around the attention itself: norm, rotation and pages."""

import torch
import triton
import triton.language as tl

from nodeserve.config import MlaConfig

_PAIRS = 1024  # rotated by a program


@triton.jit
def turned_pair(
    source: tl.tensor,  # of a head's numbers to be rotated
    angle: tl.tensor,  # places in cos and sin, [1, HALF]
    cos: tl.tensor,
    sin: tl.tensor,
    inside: tl.tensor,
    in_table: tl.tensor,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
) -> tl.tensor:
    """Both halves of what `mla_torch.rotate_pairs` makes, in float32."""
    lane = tl.arange(0, HALF)[None, :]
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart: tl.constexpr = 1 if INTERLEAVED else TURNED // 2
    first = tl.load(source + lane * step, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + lane * step + apart, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=in_table, other=0.0)
    s = tl.load(sin + angle, mask=in_table, other=0.0)
    return first * c - second * s, second * c + first * s


@triton.jit
def latent_store_kernel(
    heads: tl.tensor,  # [num_tokens, NUM_HEADS * (PLAIN + TURNED)] act
    latent: tl.tensor,  # [num_tokens, RANK + TURNED] act
    positions: tl.tensor,  # [num_tokens] int32
    slots: tl.tensor,  # [num_tokens] int32; below 0: the latent goes nowhere
    cos: tl.tensor,  # [max_position, TURNED / 2] float32
    sin: tl.tensor,
    norm: tl.tensor,  # [RANK] float32
    query: tl.tensor,  # [num_tokens, NUM_HEADS * (RANK + TURNED)] act, its rotated parts written
    pages: tl.tensor,  # [num_blocks, BLOCK_SIZE, RANK + TURNED] act, written
    block_stride: tl.tensor,  # values from one block to the next
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program
    HALF: tl.constexpr,  # TURNED / 2 up to a power of two
    BLOCK_R: tl.constexpr,  # RANK up to a power of two
) -> None:
    """The first program of a token takes its latent, the others its heads."""
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = TURNED // 2
    lane = tl.arange(0, HALF)[None, :]
    in_table = lane < half
    angle = tl.load(positions + token).to(tl.int64) * half + lane
    if tl.program_id(1) == 0:
        slot = tl.load(slots + token)
        place = (slot // BLOCK_SIZE).to(tl.int64) * block_stride
        page = pages + place + (slot % BLOCK_SIZE) * (RANK + TURNED)
        dims = tl.arange(0, BLOCK_R)
        own = latent + token * (RANK + TURNED)
        x = tl.load(own + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / RANK + eps)
        x = x * scale * tl.load(norm + dims, mask=dims < RANK, other=0.0)
        tl.store(page + dims, x.to(pages.dtype.element_ty), mask=(dims < RANK) & (slot >= 0))
        left, right = turned_pair(
            own + RANK, angle, cos, sin, in_table, in_table, TURNED, INTERLEAVED, HALF
        )
        kept = in_table & (slot >= 0)
        tl.store(page + RANK + lane, left.to(pages.dtype.element_ty), mask=kept)
        tl.store(page + RANK + half + lane, right.to(pages.dtype.element_ty), mask=kept)
    else:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < NUM_HEADS) & in_table
        source = heads + (token * NUM_HEADS + head) * (PLAIN + TURNED) + PLAIN
        left, right = turned_pair(
            source, angle, cos, sin, inside, in_table, TURNED, INTERLEAVED, HALF
        )
        target = query + (token * NUM_HEADS + head) * (RANK + TURNED) + RANK + lane
        tl.store(target, left.to(query.dtype.element_ty), mask=inside)
        tl.store(target + half, right.to(query.dtype.element_ty), mask=inside)


def latent_store(
    heads: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    norm: torch.Tensor,
    query: torch.Tensor,
    pages: torch.Tensor,
    mla: MlaConfig,
) -> None:
    """Shapes as in the kernel; pages [num_blocks, 1, 1, block_size, rank + turned]. What the heads
    are without a position stays to be written to `query`."""
    num_heads = heads.size(1) // (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    half = triton.next_power_of_2(mla.qk_rope_head_dim // 2)
    per_program = min(triton.next_power_of_2(num_heads), max(_PAIRS // half, 1))
    latent_store_kernel[(heads.size(0), 1 + triton.cdiv(num_heads, per_program))](
        heads,
        latent,
        positions,
        slots,
        *tables,
        norm,
        query,
        pages,
        pages.stride(0),
        mla.norm_eps,
        NUM_HEADS=num_heads,
        PLAIN=mla.qk_nope_head_dim,
        RANK=mla.kv_lora_rank,
        TURNED=mla.qk_rope_head_dim,
        BLOCK_SIZE=pages.size(3),
        INTERLEAVED=mla.rope_interleaved,
        HEADS=per_program,
        HALF=half,
        BLOCK_R=triton.next_power_of_2(mla.kv_lora_rank),
    )
