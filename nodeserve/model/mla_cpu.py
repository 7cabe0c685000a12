"""Latent attention on CPUs: native products with the absorbed matrices, torch's over the latents.

A token's bits do not depend on what shares its step or on where its prompt was cut. The native
operations promise that. torch's products promise it only for equal shapes, so here every token has
its own: all heads against a chunk of keys at absolute places, filled up with what nobody sees.
Chunks are small because of what that wastes. Products of this size want one thread: two of torch's
wait for each other longer than they compute, and another number of them gives other bits. So the
worker's threads take one token each.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from nodeserve.config import ModelConfig
from nodeserve.model.mla_torch import mla_of, rotate_pairs, split_up
from nodeserve.model.ops import Op
from nodeserve.model.step_torch import TorchStep
from nodeserve.model.torch_threads import TorchThreads

CHUNK = 256  # keys of one product


class ByHead:
    """A product of its own for each head."""

    def __init__(self, linears: Sequence[Op], dtype: torch.dtype) -> None:
        """linears: rows [n, k] of `dtype` to rows [n, m] float32, the same sizes for all"""
        self._linears = linears
        self._dtype = dtype

    def __call__(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """rows [n, num_heads, k] -> [n, num_heads, width] float32"""
        of_heads = rows.to(self._dtype).transpose(0, 1).contiguous()
        made = torch.empty(*of_heads.shape[:2], width)
        for linear, x, out in zip(self._linears, of_heads, made, strict=True):
            linear(x, out)
        return made.transpose(0, 1)


class CpuMlaAttention:
    """One layer's attention over latents, in float32 from what the pages hold."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: Op,
        kv_up: torch.Tensor,
        linear: Callable[[torch.Tensor], Op],
        act_dtype: torch.dtype,
        threads: TorchThreads,
    ) -> None:
        """kv_norm: rows [n, kv_lora_rank] float32 to act; `linear` binds a matrix."""
        self._mla = mla_of(config)
        self._num_heads = config.num_heads
        self._layer = layer
        self._cos, self._sin = tables
        self._norm = kv_norm
        self._act_dtype = act_dtype
        self._threads = threads
        keys, values = split_up(config, kv_up)
        self._keys = ByHead([linear(one.t().contiguous()) for one in keys], act_dtype)
        self._values = ByHead([linear(one.t().contiguous()) for one in values], act_dtype)

    def store(
        self, step: TorchStep, heads: torch.Tensor, latent: torch.Tensor, query: torch.Tensor
    ) -> None:
        mla, rows = self._mla, heads.size(0)
        cos, sin = self._cos[step.positions], self._sin[step.positions]
        normed = torch.empty(rows, mla.kv_lora_rank, dtype=self._act_dtype)
        self._norm(latent[:, : mla.kv_lora_rank].contiguous(), normed)
        turned = rotate_pairs(latent[:, mla.kv_lora_rank :], cos, sin, mla.rope_interleaved)
        pages = step.pages[:, self._layer, 0, 0]
        entry = torch.cat([normed.to(pages.dtype), turned.to(pages.dtype)], dim=-1)
        pages[step.blocks, step.slots] = entry

        own = heads.view(rows, self._num_heads, -1)
        absorbed = self._keys(own[..., : mla.qk_nope_head_dim], mla.kv_lora_rank)
        turned = own[..., mla.qk_nope_head_dim :]
        turned = rotate_pairs(turned, cos[:, None], sin[:, None], mla.rope_interleaved)
        query.view(rows, self._num_heads, -1).copy_(torch.cat([absorbed, turned], dim=-1))

    def attend(self, step: TorchStep, query: torch.Tensor, out: torch.Tensor) -> None:
        rows = query.float().view(query.size(0), self._num_heads, -1)
        seen = torch.empty(rows.size(0), self._num_heads, self._mla.kv_lora_rank)
        keys = [torch.empty(0)] * len(step.spans)

        def gather(seq: int, context: int) -> None:
            keys[seq] = self._keys_of(step, seq, context)

        def attend(seq: int, row: int, end: int) -> None:
            seen[row] = self._one_token(rows[row], keys[seq], end)

        spans = list(enumerate(step.spans))
        self._threads.run([partial(gather, seq, context) for seq, (_, _, context) in spans])
        self._threads.run(
            [
                partial(attend, seq, row, context - (last - row) + 1)
                for seq, (first, last, context) in spans
                for row in range(first, last)
            ]
        )
        values = self._values(seen, self._mla.v_head_dim)
        out.view(rows.size(0), self._num_heads, -1).copy_(values)

    def _keys_of(self, step: TorchStep, seq: int, context: int) -> torch.Tensor:
        """[chunks, CHUNK, latent_dim] float32: a sequence's latents, and zeros behind them."""
        blocks = step.block_table[seq, : -(-context // step.pages.size(4))]
        latents = step.pages[blocks, self._layer, 0, 0].flatten(0, 1)[:context]
        keys = torch.zeros(-(-context // CHUNK) * CHUNK, latents.size(1))
        keys[:context] = latents
        return keys.view(-1, CHUNK, latents.size(1))

    def _one_token(self, query: torch.Tensor, keys: torch.Tensor, end: int) -> torch.Tensor:
        """query [num_heads, latent_dim] sees `end` keys; the result [num_heads, kv_lora_rank]."""
        mla = self._mla
        own = query.clone()  # at an address like all others: products may begin by it
        highest = torch.full((self._num_heads, 1), -torch.inf)
        total = torch.zeros(self._num_heads, 1)
        values = torch.zeros(self._num_heads, mla.kv_lora_rank)
        for chunk, latents in enumerate(keys[: -(-end // CHUNK)]):
            scores = torch.mm(own, latents.t()).mul_(mla.softmax_scale)
            scores[:, max(end - chunk * CHUNK, 0) :] = -torch.inf
            higher = torch.maximum(highest, scores.amax(1, keepdim=True))
            weights = scores.sub_(higher).exp_()
            decay = (highest - higher).exp_()
            total = total.mul_(decay).add_(weights.sum(1, keepdim=True))
            values = values.mul_(decay).add_(torch.mm(weights, latents[:, : mla.kv_lora_rank]))
            highest = higher
        return values.div_(total)
