"""Embedding rows, the gated activation, and the tokens that never left the device."""

import torch
import triton
import triton.language as tl

TILE = 1024


@triton.jit(do_not_specialize_on_alignment=["token_ids"])
def embedding_kernel(
    token_ids: tl.tensor,  # [rows] int32
    table: tl.tensor,  # [VOCAB, WIDTH] act
    out: tl.tensor,  # [rows, WIDTH] float32, written
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token_id = tl.load(token_ids + row).to(tl.int64)
    known = (token_id >= 0) & (token_id < VOCAB)  # nothing here can raise: others become zeros
    inside = column < WIDTH
    values = tl.load(table + token_id * WIDTH + column, mask=inside & known, other=0.0)
    tl.store(out + row * WIDTH + column, values.to(tl.float32), mask=inside)


@triton.jit
def silu_mul_kernel(
    gate_up: tl.tensor,  # [rows, 2 * WIDTH] act
    out: tl.tensor,  # [rows, WIDTH] act, written
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < WIDTH
    source = gate_up + row * 2 * WIDTH + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["token_ids", "feed", "sampled"],
)
def feed_kernel(
    token_ids: tl.tensor,  # [num_tokens] int32, written where fed
    feed: tl.tensor,  # [num_tokens] int32
    sampled: tl.tensor,  # [rows] int32
    num_tokens: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    source = tl.load(feed + place, mask=place < num_tokens, other=-1)
    fed = source >= 0
    tl.store(token_ids + place, tl.load(sampled + source, mask=fed, other=0), mask=fed)


def embedding(token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """token_ids [rows] int32, table [vocab, width] -> out [rows, width] float32"""
    vocab, width = table.shape
    grid = (token_ids.numel(), triton.cdiv(width, TILE))
    embedding_kernel[grid](token_ids, table, out, VOCAB=vocab, WIDTH=width, TILE=TILE)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """gate_up [rows, 2 * width] -> out [rows, width] = silu(left half) * right half"""
    rows, width = out.shape
    silu_mul_kernel[(rows, triton.cdiv(width, TILE))](gate_up, out, WIDTH=width, TILE=TILE)


def feed_tokens(token_ids: torch.Tensor, feed: torch.Tensor, sampled: torch.Tensor) -> None:
    """token_ids[i] = sampled[feed[i]] where feed[i] >= 0; all int32, [num_tokens] and [rows].

    So a step's inputs can be made before the tokens of the step before it are known here.
    """
    num_tokens = token_ids.numel()
    grid = (triton.cdiv(num_tokens, TILE),)
    feed_kernel[grid](token_ids, feed, sampled, num_tokens, TILE=TILE)
