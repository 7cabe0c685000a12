"""The two libraries that may be there, behind one call each for packed and for paged keys.

flash-attn (2.8 and later) and torch's `varlen_attn` both align the causal mask to the end of the
context, and count a window in the tokens before a query: ours counts the query too.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from nodeserve.model.gpu.attention.parts import Segment


def key_starts_of(segment: Segment) -> torch.Tensor:
    """Where each context begins when they lie end to end, and the end: int32 [num_seqs + 1]."""
    ends = segment.context_lens.cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


class Library(Protocol):
    """Causal attention of somebody else's making; results are [num_tokens, num_heads, head_dim]."""

    name: str

    def packed(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        key_starts: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        """keys, values [num_keys, num_kv_heads, head_dim]: the contexts end to end, from where
        key_starts [num_seqs + 1] int32 says, and anything behind them"""

    def paged(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        window: int | None,
    ) -> torch.Tensor:
        """keys, values [num_blocks, block_size, num_kv_heads, head_dim], strided"""


class FlashAttn:
    """The flash_attn package."""

    name = "flash-attn"

    def __init__(self, module: Any) -> None:
        self._module = module

    def packed(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        key_starts: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        return self._varlen(query, keys, values, segment, key_starts, None, window)

    def paged(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        window: int | None,
    ) -> torch.Tensor:
        table = segment.block_table
        if segment.max_query_len > 1:
            starts = key_starts_of(segment)
            return self._varlen(query, keys, values, segment, starts, table, window)
        out: torch.Tensor = self._module.flash_attn_with_kvcache(
            query.unsqueeze(1),
            keys,
            values,
            cache_seqlens=segment.context_lens,
            block_table=table,
            causal=True,
            window_size=self._window(window),
        )
        return out.squeeze(1)

    def _varlen(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        key_starts: torch.Tensor,
        block_table: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        out: torch.Tensor = self._module.flash_attn_varlen_func(
            query,
            keys,
            values,
            cu_seqlens_q=segment.query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=segment.max_query_len,
            max_seqlen_k=segment.max_context_len,
            causal=True,
            window_size=self._window(window),
            block_table=block_table,
        )
        return out

    @staticmethod
    def _window(window: int | None) -> tuple[int, int]:
        return (-1, -1) if window is None else (window - 1, 0)


class TorchVarlen:
    """torch.nn.attention.varlen, whose parameters differ from release to release."""

    name = "torch"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._parameters = varlen_parameters(function)

    def packed(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        key_starts: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        return self._call(query, keys, values, segment, key_starts, window, {})

    def paged(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        window: int | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {
            "seqused_k": segment.context_lens,
            "block_table": segment.block_table,
        }
        if segment.max_query_len > 1 and "num_splits" in self._parameters:
            # Splits of packed queries of several tokens are put together wrongly in some releases.
            options["num_splits"] = 1
        return self._call(query, keys, values, segment, None, window, options)

    def _call(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segment: Segment,
        key_starts: torch.Tensor | None,
        window: int | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        if "window_size" in self._parameters:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if "enable_gqa" in self._parameters:
            options["enable_gqa"] = True
        out: torch.Tensor = self._function(
            query,
            keys,
            values,
            segment.query_starts,
            key_starts,
            segment.max_query_len,
            segment.max_context_len,
            **options,
        )
        return out


def varlen_parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)
