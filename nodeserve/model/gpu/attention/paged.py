"""The backend a model gets: one part for decodes, one for prefill chunks."""

import torch

from nodeserve.model.gpu.attention.parts import Part, Segment, decodes_of, prefills_of
from nodeserve.model.gpu.step import GpuStep


class PagedAttention:
    """An `AttentionBackend` of two parts. Steps on two streams at once need two of it."""

    def __init__(self, decode: Part, prefill: Part, name: str) -> None:
        self.name = name
        self.capturable = decode.capturable  # whether CUDA graphs may hold a step of decodes
        self._decode = decode
        self._prefill = prefill
        self._planned: GpuStep | None = None
        self._decodes: Segment | None = None
        self._prefills: Segment | None = None

    def reserve(self, max_tokens: int, max_seqs: int, max_context_len: int) -> None:
        self._decode.reserve(max_tokens, max_seqs, max_context_len)
        self._prefill.reserve(max_tokens, max_seqs, max_context_len)

    def plan(self, step: GpuStep) -> None:
        self._decodes, self._prefills = decodes_of(step), prefills_of(step)
        self._planned = step

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        step: GpuStep,
        out: torch.Tensor,
        window: int | None,
    ) -> None:
        assert step is self._planned, "plan(step) comes before a step's first attend"
        count = step.num_decodes
        if self._decodes is not None:
            self._decode.run(query[:count], pages, self._decodes, out[:count], window)
        if self._prefills is not None:
            self._prefill.run(query[count:], pages, self._prefills, out[count:], window)
