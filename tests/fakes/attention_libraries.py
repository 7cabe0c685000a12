"""flash_attn and torch's varlen_attn as documented, in plain torch; strict about arguments."""

from collections.abc import Iterator

import torch


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    window: tuple[int, int],
) -> torch.Tensor:
    """One sequence: query [tokens, heads, dim], keys and values [context, kv_heads, dim].

    Query i is at i + context - tokens; it sees `window[0]` keys before itself and `window[1]` after
    it, -1 being all of them.
    """
    tokens, context = query.size(0), keys.size(0)
    group = query.size(1) // keys.size(1)
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    place = torch.arange(tokens)[:, None] + context - tokens
    after = torch.arange(context)[None, :] - place
    hidden = torch.zeros(tokens, context, dtype=torch.bool)
    if causal:
        hidden |= after > 0
    if window[0] >= 0:
        hidden |= after < -window[0]
    if window[1] >= 0:
        hidden |= after > window[1]
    scores = torch.einsum("thd,chd->htc", query.double(), keys) * query.size(2) ** -0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("htc,chd->thd", weights, values).to(query.dtype)


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    for tensor in (query, keys, values):
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
    assert query.size(-2) % keys.size(-2) == 0
    assert keys.shape == values.shape


def _check_int32(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or (tensor.dtype == torch.int32 and tensor.stride(-1) == 1)


def _from_pages(pages: torch.Tensor, blocks: torch.Tensor, context: int) -> torch.Tensor:
    """pages [num_blocks, block_size, kv_heads, dim] -> [context, kv_heads, dim]"""
    assert pages.size(1) % 256 == 0, "Paged KV cache block size must be divisible by 256"
    return pages[blocks[: -(-context // pages.size(1))].long()].flatten(0, 1)[:context]


def _spans(starts: torch.Tensor) -> Iterator[tuple[int, int]]:
    assert starts[0] == 0
    ends = starts.tolist()
    return zip(ends, ends[1:], strict=False)


class FlashAttnModule:
    """The package flash_attn, 2.8. Says which of its functions ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        block_table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.calls.append("varlen" if block_table is None else "varlen paged")
        _check(q, k, v)
        _check_int32(cu_seqlens_q, cu_seqlens_k, block_table)
        assert dropout_p == 0.0 and softmax_scale is None and softcap == 0.0
        assert cu_seqlens_q[-1] == q.size(0)
        out = torch.empty_like(q)
        for seq, span in enumerate(zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True)):
            (first, last), (begin, end) = span
            assert last - first <= max_seqlen_q and end - begin <= max_seqlen_k
            if block_table is None:
                keys, values = k[begin:end], v[begin:end]
            else:
                table = block_table[seq]
                keys, values = (_from_pages(x, table, end - begin) for x in (k, v))
            out[first:last] = _attention(q[first:last], keys, values, causal, window_size)
        return out

    def flash_attn_with_kvcache(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        cache_seqlens: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        self.calls.append("kvcache")
        _check(q, k_cache, v_cache)
        _check_int32(cache_seqlens, block_table)
        assert q.dim() == 4 and k is None and v is None and softmax_scale is None
        assert cache_seqlens is not None and block_table is not None
        out = torch.empty_like(q)
        for seq, context in enumerate(cache_seqlens.tolist()):
            keys, values = (_from_pages(x, block_table[seq], context) for x in (k_cache, v_cache))
            out[seq] = _attention(q[seq], keys, values, causal, window_size)
        return out


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn of torch 2.12 and later."""
    _check(query, key, value)
    _check_int32(cu_seq_q, cu_seq_k, seqused_k, block_table)
    assert scale is None
    assert enable_gqa or query.size(1) == key.size(-2), "same number of heads"
    assert (cu_seq_k is None) == (block_table is not None) == (seqused_k is not None)
    if block_table is not None and max_q > 1:
        assert num_splits == 1, "splits of packed queries are merged wrongly"
    out = torch.empty_like(query)
    for seq, (first, last) in enumerate(_spans(cu_seq_q)):
        if block_table is not None and seqused_k is not None:
            context = int(seqused_k[seq])
            keys, values = (_from_pages(x, block_table[seq], context) for x in (key, value))
        else:
            assert cu_seq_k is not None
            begin, end = cu_seq_k[seq : seq + 2].tolist()
            keys, values = key[begin:end], value[begin:end]
        assert last - first <= max_q and keys.size(0) <= max_k
        out[first:last] = _attention(query[first:last], keys, values, False, window_size)
    return out


def older_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:
    """varlen_attn of torch 2.10: no window, no pages."""
    assert is_causal
    window = (-1, 0)
    rest = (cu_seq_q, cu_seq_k, max_q, max_k)
    return varlen_attn(query, key, value, *rest, window_size=window, enable_gqa=True)
