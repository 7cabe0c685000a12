"""The arithmetic of the attention benchmark, and its steps: they compute what is claimed."""

import pytest
import torch

from bench.gpu import attention as bench
from bench.gpu import latents
from nodeserve.model.gpu.attention.latent_parts import LatentHeads, LatentReference
from nodeserve.model.gpu.attention.paged import PagedAttention
from nodeserve.model.gpu.attention.parts import Heads
from nodeserve.model.gpu.attention.reference import ReferenceAttention
from nodeserve.model.gpu.attention.tiles import ROOMY
from nodeserve.model.gpu.attention.triton_parts import TritonDecode, TritonPrefill


def test_bytes_of_a_decode() -> None:
    """Llama-3.1-8B: 8 heads of 128 values of 2 bytes, K and V: 4 KiB a token and layer."""
    assert bench.visible_bytes(bench.LLAMA_8B, 64, 8192) == 64 * 8192 * 4096


def test_flops_of_a_prefill() -> None:
    """4 operations a value of 32 heads of 128 for each visible pair."""
    a_pair = 4 * 32 * 128
    assert bench.visible_flops(bench.LLAMA_8B, 1, 1, 1) == a_pair
    assert bench.visible_flops(bench.LLAMA_8B, 1, 4, 4) == 10 * a_pair
    assert bench.visible_flops(bench.LLAMA_8B, 3, 2, 10) == 3 * (9 + 10) * a_pair


def test_a_row_reads_well() -> None:
    row = bench.Row("decode", "triton", 64, 1, 8192, 512.25, 4192.4, 0.871)
    text = "decode 64 x 1 of 8192 512.2 us 4192.4 GB/s 87% triton"
    assert " ".join(str(row).split()) == text


@pytest.mark.parametrize(("query_len", "context_len"), [(1, 40), (20, 40)])
def test_work_is_attention_over_every_layer(
    query_len: int, context_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "POOL_BYTES", 3 * 2 * 40 * 2 * 2 * 16 * 4)
    heads, device = Heads(4, 2, 16, 16, torch.float32), torch.device("cpu")
    work = bench.make_work(heads, 2, query_len, context_len, device)
    assert work.pool.size(1) == 3
    judge = ReferenceAttention()
    work.run(PagedAttention(judge, judge, judge.name))
    wanted = work.out.clone()
    work.out.fill_(torch.nan)
    decode, prefill = TritonDecode(heads, device, 2), TritonPrefill(heads, ROOMY)
    work.run(PagedAttention(decode, prefill, "triton"))
    torch.testing.assert_close(work.out, wanted)


def test_the_floor_of_a_step_over_latents() -> None:
    """1,152 bytes a token; 2,176 operations a pair and head, which more heads wait for."""
    ceilings = bench.Ceilings(copy_gb_s=4000.0, product_tflop_s=800.0)
    few, many = latents.heads_of(16), latents.heads_of(128)
    assert latents.visible_bytes(few, 64, 8192) == 64 * 8192 * 1152
    assert latents.visible_flops(few, 3, 2, 10) == 3 * (9 + 10) * 16 * 2176
    reading = 64 * 8192 * 1152 / 4e12 * 1e6
    assert latents.floor_us(few, 64, 1, 8192, ceilings) == pytest.approx(reading)
    computing = 64 * 8192 * 128 * 2176 / 8e14 * 1e6
    assert latents.floor_us(many, 64, 1, 8192, ceilings) == pytest.approx(computing)
    assert computing > reading


def test_work_over_latents_is_attention_over_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "POOL_BYTES", 3 * 2 * 40 * 48 * 4)
    heads = LatentHeads(4, 32, 16, 0.2, 16, torch.float32)
    work = latents.make_work(heads, 2, 1, 40, torch.device("cpu"))
    assert work.pool.shape == (6, 3, 1, 1, 16, 48)
    work.out.fill_(torch.nan)
    judge = LatentReference(heads)
    work.run(PagedAttention(judge, judge, judge.name))
    assert work.out.isfinite().all()
