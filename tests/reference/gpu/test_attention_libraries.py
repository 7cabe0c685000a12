"""flash-attn and torch's attention behind our signature: which call, and with what arguments."""

from typing import Any

import pytest
import torch

from nodeserve.model.gpu.attention.case import TOLERANCE, make_case
from nodeserve.model.gpu.attention.libraries import FlashAttn, Library, TorchVarlen
from nodeserve.model.gpu.attention.library_parts import GatheredLibrary, PagedLibrary
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.step import AttentionBackend
from tests.fakes.attention_libraries import FlashAttnModule, older_varlen_attn, varlen_attn

CPU = torch.device("cpu")
LENGTHS = [(1, 1), (1, 260), (1, 17), (5, 5), (33, 300), (2, 2)]


class Refuse(ReferenceAttention):
    """A part that is not to be reached."""

    def run(self, *arguments: Any) -> None:
        raise AssertionError("ran")


def heads_of(block_size: int, dtype: torch.dtype = torch.bfloat16) -> Heads:
    return Heads(4, 2, 64, block_size, dtype)


def paged(library: Library) -> PagedAttention:
    return PagedAttention(PagedLibrary(library), PagedLibrary(library), library.name)


def gathered(library: Library, heads: Heads, room: int, beyond: Any) -> PagedAttention:
    part = GatheredLibrary(library, heads, CPU, beyond)
    part.reserve(room, 8, 0)
    return PagedAttention(ReferenceAttention(), part, part.name)


def check(backend: AttentionBackend, heads: Heads, window: int | None) -> None:
    case = make_case(heads, LENGTHS, CPU)
    assert case.error(backend, window) < TOLERANCE[heads.dtype]


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attn_reads_large_pages(window: int | None, dtype: torch.dtype) -> None:
    module = FlashAttnModule()
    check(paged(FlashAttn(module)), heads_of(256, dtype), window)
    assert module.calls == ["kvcache", "varlen paged"]


@pytest.mark.parametrize("window", [None, 1, 20])
def test_flash_attn_gets_small_pages_gathered(window: int | None) -> None:
    module, heads = FlashAttnModule(), heads_of(16)
    check(gathered(FlashAttn(module), heads, 900, Refuse()), heads, window)
    assert module.calls == ["varlen"]


@pytest.mark.parametrize("window", [None, 1, 20])
def test_torch_reads_large_pages(window: int | None) -> None:
    check(paged(TorchVarlen(varlen_attn)), heads_of(512), window)


@pytest.mark.parametrize("window", [None, 20])
def test_torch_gets_small_pages_gathered(window: int | None) -> None:
    heads = heads_of(48, torch.float16)
    check(gathered(TorchVarlen(varlen_attn), heads, 900, Refuse()), heads, window)


def test_a_torch_without_windows_is_called_its_own_way() -> None:
    heads = heads_of(16)
    check(gathered(TorchVarlen(older_varlen_attn), heads, 900, Refuse()), heads, None)


def test_contexts_without_room_go_elsewhere() -> None:
    """Room is counted for the longest context of every sequence: 3 prefills of up to 300."""
    heads, module = heads_of(16), FlashAttnModule()
    check(gathered(FlashAttn(module), heads, 899, ReferenceAttention()), heads, None)
    assert module.calls == []


def test_pages_with_other_head_sizes_are_gathered() -> None:
    heads, module = Heads(6, 3, 80, 16, torch.bfloat16), FlashAttnModule()
    check(gathered(FlashAttn(module), heads, 900, Refuse()), heads, None)
    assert module.calls == ["varlen"]


def test_room_grows_and_does_not_shrink() -> None:
    part = GatheredLibrary(FlashAttn(FlashAttnModule()), heads_of(16), CPU, ReferenceAttention())
    part.reserve(100, 4, 1000)
    room = part._keys
    part.reserve(50, 4, 1000)
    assert part._keys is room and room.size(0) == 1100


def test_decodes_over_pages_may_be_captured_and_the_judge_may_not() -> None:
    """What launches depend on: host ints only, or lengths that are read back."""
    judge = ReferenceAttention()
    library = PagedLibrary(FlashAttn(FlashAttnModule()))
    assert PagedAttention(library, judge, "").capturable
    assert not PagedAttention(judge, library, "").capturable
