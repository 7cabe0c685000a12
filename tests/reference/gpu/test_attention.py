"""The Triton attention kernels against plain torch, over ragged steps with traps in the pages."""

from collections.abc import Sequence

import pytest
import torch

from nodeserve.model.gpu.attention import tiles
from nodeserve.model.gpu.attention.case import TOLERANCE, Case, make_case
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.attention.triton_parts import TritonDecode, TritonPrefill, decode_constants

RAGGED = [(1, 1), (1, 16), (1, 17), (1, 150), (1, 33), (15, 15), (17, 40), (2, 130), (40, 40)]


def heads_of(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    return Heads(num_heads, num_kv_heads, head_dim, block_size, dtype)


def triton_backend(
    heads: Heads, device: torch.device, num_sms: int = 2, table: tiles.Table = tiles.ROOMY
) -> PagedAttention:
    decode = TritonDecode(heads, device, num_sms)
    return PagedAttention(decode, TritonPrefill(heads, table), "triton")


def check(
    heads: Heads,
    lengths: Sequence[tuple[int, int]],
    device: torch.device,
    window: int | None = None,
    num_sms: int = 2,
) -> Case:
    case = make_case(heads, lengths, device)
    backend = triton_backend(heads, device, num_sms)
    assert case.error(backend, window) < TOLERANCE[heads.dtype]
    return case


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
def test_query_heads_share_their_kv_head(group: int, device: torch.device) -> None:
    check(heads_of(2 * group), [(1, 20), (1, 3), (19, 37)], device)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_head_sizes_and_types(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(heads_of(head_dim=head_dim, dtype=dtype), [(1, 150), (1, 1), (50, 70)], device)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(heads_of(block_size=block_size), RAGGED, device)


@pytest.mark.parametrize("window", [1, 7, 16, 31, 32, 33, 64, 1000])
def test_windows(window: int, device: torch.device) -> None:
    check(heads_of(), RAGGED, device, window)
    check(heads_of(dtype=torch.bfloat16), [(1, 150), (70, 150)], device, window)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300])
def test_contexts(context: int, device: torch.device) -> None:
    check(heads_of(dtype=torch.float16), [(1, context), (min(context, 9), context)], device)


@pytest.mark.parametrize("chunk", [1, 2, 31, 32, 33, 64, 100])
def test_chunks_of_a_prompt(chunk: int, device: torch.device) -> None:
    """A chunk's rows are the last of its context, wherever tiles of queries and keys begin."""
    check(heads_of(), [(2, 2), (chunk, 100), (chunk, chunk)], device)


def test_a_chunk_at_a_time_is_the_whole_prompt(device: torch.device) -> None:
    heads = heads_of()
    whole = make_case(heads, [(90, 90)], device)
    backend = triton_backend(heads, device)
    wanted = whole.run(backend, None)
    for first, last in [(0, 40), (40, 41), (41, 90)]:
        part = make_case(heads, [(last - first, last)], device)
        step = part.step
        table = whole.step.block_table[:, : step.block_table.size(1)]
        step = type(step)(
            step.token_ids, step.positions, step.slots, step.query_starts, step.context_lens,
            table, step.num_decodes, step.max_query_len, step.max_context_len,
        )  # fmt: skip
        got = Case(whole.query[first:last], whole.pages, step).run(backend, None)
        torch.testing.assert_close(got, wanted[first:last])


@pytest.mark.parametrize("num_sms", [1, 2, 5, 12])
def test_splits_do_not_change_the_result(num_sms: int, device: torch.device) -> None:
    """However many programs the contexts are cut for; some are cut, some are not."""
    lengths = [(1, 700), (1, 31), (1, 1), (1, 260)]
    check(heads_of(), lengths, device, window=None if num_sms % 2 else 300, num_sms=num_sms)


def test_many_splits_are_merged_in_several_rounds(device: torch.device) -> None:
    """A program merges as many at a time as its registers hold: here 2, of up to 13."""
    heads = heads_of(8, 1, head_dim=256)
    constants = decode_constants(heads, tiles.decode_tiles(256, heads.dtype), 2, None)
    assert constants["MERGE"] == 2
    check(heads, [(1, 208), (1, 50)], device, num_sms=8)


def test_the_counters_are_zero_after_every_step(device: torch.device) -> None:
    """The last program of a sequence resets its counter, or the next step would merge too soon."""
    heads = heads_of()
    backend = triton_backend(heads, device, num_sms=8)
    for lengths in ([(1, 400), (1, 300)], [(1, 200), (1, 700)], [(1, 5), (1, 640)]):
        assert make_case(heads, lengths, device).error(backend, None) < TOLERANCE[torch.float32]


def test_padding_rows_are_harmless(device: torch.device) -> None:
    """Rows that fill a batch up: a context of 1, or none at all, which gives 0 and no NaN."""
    check(heads_of(), [(1, 40), (1, 1), (1, 1)], device)
    check(heads_of(), [(1, 40), (1, 0), (1, 0)], device, window=8)


def test_the_same_step_gives_the_same_bits(device: torch.device) -> None:
    """Splits are merged in their own order, whichever program comes last."""
    heads = heads_of(dtype=torch.bfloat16)
    case = make_case(heads, [(1, 300), (1, 60), (1, 90)], device)
    backend = triton_backend(heads, device)
    assert torch.equal(case.run(backend, None), case.run(backend, None))


def test_one_scratch_serves_steps_up_to_its_size(device: torch.device) -> None:
    heads = heads_of()
    decode = TritonDecode(heads, device, 4)
    decode.reserve(64, 8, 1000)
    kept = decode._splits._rooms[-1].partials.data_ptr()
    decode.reserve(64, 4, 500)
    backend = PagedAttention(decode, TritonPrefill(heads, tiles.SMALL), "triton")
    make_case(heads, [(1, 90)] * 8, device).run(backend, None)
    assert [room.partials.data_ptr() for room in decode._splits._rooms] == [kept]
    make_case(heads, [(1, 90)] * 9, device).run(backend, None)
    assert len(decode._splits._rooms) == 2  # the smaller one lives on: a graph may know its address


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_sms", [1, 3, 8])
def test_no_step_makes_more_splits_than_the_grid_has(
    num_sms: int, window: int | None, device: torch.device
) -> None:
    """The grid follows from numbers that hold for every replay; the splits from the contexts."""
    heads = heads_of(head_dim=16, num_heads=2, num_kv_heads=1)
    generator = torch.Generator().manual_seed(num_sms)
    for _ in range(2):
        contexts = torch.randint(1, 400, (5,), generator=generator).tolist()
        check(heads, [(1, context) for context in contexts], device, window, num_sms=num_sms)


@pytest.mark.parametrize("table", [tiles.ROOMY, tiles.SMALL], ids=["roomy", "small"])
def test_both_tables(table: tiles.Table, device: torch.device) -> None:
    heads = heads_of(dtype=torch.bfloat16, head_dim=256)
    backend = triton_backend(heads, device, table=table)
    assert make_case(heads, RAGGED, device).error(backend, None) < TOLERANCE[torch.bfloat16]


def test_a_case_notices_what_is_left_out_and_what_is_too_much(device: torch.device) -> None:
    """The judge of the judge: one token less or more in a long context is no rounding."""
    heads = heads_of(dtype=torch.bfloat16)
    case = make_case(heads, [(1, 300), (1, 300)], device)
    backend = triton_backend(heads, device)
    assert case.error(backend, None) < TOLERANCE[torch.bfloat16]

    class Wrong(PagedAttention):
        off = 0

        def plan(self, step):  # type: ignore[no-untyped-def]
            super().plan(step)
            assert self._decodes is not None
            self._decodes.context_lens.add_(self.off)

    for off in (-1, 1):
        case = make_case(heads, [(1, 300), (1, 300)], device)
        wanted = case.run(backend, None).float()
        part = TritonDecode(heads, device, 2)
        wrong = Wrong(part, TritonPrefill(heads, tiles.ROOMY), "wrong")
        wrong.off = off
        got = case.run(wrong, None).float()
        distance = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert not float(distance.max()) < TOLERANCE[torch.bfloat16]
