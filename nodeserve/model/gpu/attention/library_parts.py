"""Libraries as parts of a backend: over pages where they read ours, else over gathered keys."""

import torch
import triton

from nodeserve.model.gpu.attention.kernel_gather import gather_pages
from nodeserve.model.gpu.attention.libraries import Library, key_starts_of
from nodeserve.model.gpu.attention.parts import Heads, Part, Segment
from nodeserve.model.gpu.attention.tiles import power_of_two
from nodeserve.model.gpu.attention.triton_parts import page_strides

GATHERED_TOKENS = 64  # of one program


class PagedLibrary:
    """A library that reads pages of our block size, for decodes or prefills."""

    capturable = True

    def __init__(self, library: Library) -> None:
        self.name = library.name
        self._library = library

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        pass  # torch's allocator keeps what the library takes

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        # One block is [heads, tokens] for us and [tokens, heads] for them: the same memory.
        keys, values = (pages[:, half].transpose(1, 2) for half in (0, 1))
        out.copy_(self._library.paged(query, keys, values, segment, window))


class GatheredLibrary:
    """A library that wants keys end to end, for prefills.

    Gathering costs a copy of the context, little beside the attention of a long prompt over it.
    How long the contexts are together is on the device, so room is counted for the longest one of
    every sequence; steps with more go to `beyond`.
    """

    capturable = False

    def __init__(self, library: Library, heads: Heads, device: torch.device, beyond: Part) -> None:
        self.name = f"{library.name} over gathered pages"
        self._library = library
        self._heads = heads
        self._beyond = beyond
        self._device = device
        self._keys = self._values = self._room(0)

    def _room(self, capacity: int) -> torch.Tensor:
        shape = (capacity, self._heads.num_kv_heads, self._heads.head_dim)
        return torch.empty(shape, dtype=self._heads.dtype, device=self._device)

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        self._beyond.reserve(max_tokens, max_seqs, max_context_len)
        capacity = max_context_len + max_tokens  # one long context, or many short prompts
        if capacity > self._keys.size(0):
            self._keys, self._values = self._room(capacity), self._room(capacity)

    def run(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        segment: Segment,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        if segment.num_seqs * segment.max_context_len > self._keys.size(0):
            self._beyond.run(query, pages, segment, out, window)
            return
        starts = key_starts_of(segment)
        self._gather(pages, segment, starts)
        packed = self._library.packed
        out.copy_(packed(query, self._keys, self._values, segment, starts, window))

    def _gather(self, pages: torch.Tensor, segment: Segment, starts: torch.Tensor) -> None:
        heads = self._heads
        tiles = triton.cdiv(segment.max_context_len, GATHERED_TOKENS)
        gather_pages[tiles, heads.num_kv_heads, segment.num_seqs](
            pages,
            self._keys,
            self._values,
            segment.block_table,
            segment.context_lens,
            starts,
            segment.block_table.stride(0),
            *page_strides(pages),
            HEAD_DIM=heads.head_dim,
            BLOCK_SIZE=heads.block_size,
            BLOCK_N=GATHERED_TOKENS,
            BLOCK_D=power_of_two(heads.head_dim),
        )
