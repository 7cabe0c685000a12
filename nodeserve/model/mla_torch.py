"""Latent attention in plain torch: the judge of the others.

Per query and key a head takes 2 * (2 * kv_lora_rank + rope) operations, against
2 * (nope + rope + v) with keys and values made of the latents first: 2,176 against 640 with
DeepSeek's sizes. Making them costs 262,144 a head for each token of the context, in every step: it
would pay for chunks of more than 170 tokens. One way serves both, here and in the other backends,
as pages hold latents only.

A sequence's scores are products of its own, whatever shares its step.
"""

import torch

from nodeserve.config import MlaConfig, ModelConfig
from nodeserve.model.step_torch import TorchStep, rms_norm

MAX_SCORES = 1 << 23  # held at once: 32 MiB


def mla_of(config: ModelConfig) -> MlaConfig:
    assert config.mla is not None, f"{config.architecture} has no latents"
    return config.mla


def rotate_pairs(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x [..., rope_dim] rotated; cos and sin [..., rope_dim / 2].

    Pairs lie next to each other in x if `interleaved`; in the result their halves are apart.
    Queries and keys are laid out alike, which is all that scores ask for.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def split_up(config: ModelConfig, kv_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of kv_up, ready for a batched product over heads.

    Keys [num_heads, qk_nope_head_dim, kv_lora_rank], values [num_heads, kv_lora_rank, v_head_dim].
    """
    mla = mla_of(config)
    heads = kv_up.view(config.num_heads, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
    keys, values = torch.split(heads, [mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
    return keys.contiguous(), values.transpose(1, 2).contiguous()


def latent_attention(
    rows: torch.Tensor, latents: torch.Tensor, rank: int, scale: float
) -> torch.Tensor:
    """Causal attention of one sequence whose queries are the last tokens of its context.

    rows [tokens, num_heads, latent_dim], latents [context, latent_dim], all float32; the result
    [tokens, num_heads, rank], of the first `rank` numbers of each latent.
    """
    tokens, num_heads, _ = rows.shape
    context = latents.size(0)
    scores = (rows.flatten(0, 1) @ latents.t()).mul_(scale).view(tokens, num_heads, context)
    if tokens > 1:
        row = torch.arange(context - tokens, context, device=rows.device)
        hidden = row[:, None] < torch.arange(context, device=rows.device)
        scores.masked_fill_(hidden[:, None], -torch.inf)
    values = scores.softmax(-1).flatten(0, 1) @ latents[:, :rank]
    return values.view(tokens, num_heads, rank)


class TorchMlaAttention:
    """One layer's attention over latents, in float32 from what the pages hold."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tables: tuple[torch.Tensor, torch.Tensor],
        kv_norm: torch.Tensor,
        kv_up: torch.Tensor,
    ) -> None:
        """All tensors float32 on the device, shapes as in `Ops.mla_attention`."""
        self._mla = mla_of(config)
        self._num_heads = config.num_heads
        self._layer = layer
        self._cos, self._sin = tables
        self._norm = kv_norm
        self._keys, self._values = split_up(config, kv_up)

    def store(
        self, step: TorchStep, heads: torch.Tensor, latent: torch.Tensor, query: torch.Tensor
    ) -> None:
        mla, rows = self._mla, heads.size(0)
        cos, sin = self._cos[step.positions], self._sin[step.positions]
        plain, turned = torch.split(
            latent.float(), [mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1
        )
        normed = rms_norm(plain, self._norm, mla.norm_eps)
        turned = rotate_pairs(turned, cos, sin, mla.rope_interleaved)
        pages = step.pages[:, self._layer, 0, 0]
        pages[step.blocks, step.slots] = torch.cat([normed, turned], dim=-1).to(pages.dtype)

        parts = [mla.qk_nope_head_dim, mla.qk_rope_head_dim]
        own = heads.float().view(rows, self._num_heads, -1)
        plain, turned = torch.split(own, parts, dim=-1)
        turned = rotate_pairs(turned, cos[:, None], sin[:, None], mla.rope_interleaved)
        absorbed = torch.bmm(plain.transpose(0, 1), self._keys).transpose(0, 1)
        query.view(rows, self._num_heads, -1).copy_(torch.cat([absorbed, turned], dim=-1))

    def attend(self, step: TorchStep, query: torch.Tensor, out: torch.Tensor) -> None:
        rows = query.float().view(query.size(0), self._num_heads, -1)
        seen = rows.new_empty(rows.size(0), self._num_heads, self._mla.kv_lora_rank)
        for seq, (first, last, context) in enumerate(step.spans):
            self._one_sequence(step, seq, rows[first:last], seen[first:last], context)
        values = torch.bmm(seen.transpose(0, 1), self._values)  # [num_heads, rows, v_head_dim]
        out.view(rows.size(0), self._num_heads, -1).copy_(values.transpose(0, 1))

    def _one_sequence(
        self, step: TorchStep, seq: int, rows: torch.Tensor, seen: torch.Tensor, context: int
    ) -> None:
        """rows [tokens, num_heads, latent_dim], the last ones of `context`, a few at a time."""
        blocks = step.block_table[seq, : -(-context // step.pages.size(4))]
        latents = step.pages[blocks, self._layer, 0, 0].flatten(0, 1)[:context].float()
        before = context - rows.size(0)
        stride = max(MAX_SCORES // (self._num_heads * context), 1)
        for first in range(0, rows.size(0), stride):
            part = rows[first : first + stride]
            end = before + first + part.size(0)
            seen[first : first + stride] = latent_attention(
                part, latents[:end], self._mla.kv_lora_rank, self._mla.softmax_scale
            )
