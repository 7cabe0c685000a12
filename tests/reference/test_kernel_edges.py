"""The edge of the native kernels: pages, blocks, and every bad argument named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nodeserve import _host

ENGINE = _host.CpuEngine()
PAGE = torch.zeros(1 << 16, dtype=torch.uint8)
AT = PAGE.data_ptr()


def _copy(**changes: Any) -> None:
    """Of 2 bytes from blocks of 2 to blocks of 4."""
    ids = {"dst_ids": [0], "src_ids": [0]}
    sizes = {"dst_block_bytes": 4, "src_block_bytes": 2}
    usual = {"dst": bytearray(8), "src": bytes(8), "runs": [(0, 0, 2)], **sizes, **ids}
    _host.copy_blocks(**{**usual, **changes})


def _attention(**changes: object) -> _host.CpuAttention:
    arguments = {
        "engine": ENGINE,
        "dtype": "float32",
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 64,
        "scale": 1.0,
        "window": 8,
        "cos": AT,
        "sin": AT,
        "max_position": 8,
        "q_norm": 0,
        "k_norm": 0,
        "norm_eps": 1e-5,
    }
    return _host.CpuAttention(**{**arguments, **changes})  # type: ignore[arg-type]


def _prepare(**changes: list[int]) -> None:
    arrays = {
        "positions": [0, 1, 4],
        "query_starts": [0, 2, 3],
        "context_lens": [2, 5],
        "block_table": [0, 1],
        **changes,
    }
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in arrays.items()}
    pages = _pages()
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    _host.CpuPlan().prepare(ENGINE, pages, 2, **addresses, num_tokens=3, num_seqs=2, max_blocks=1)


def _linear(**changes: object) -> _host.CpuLinear:
    arguments = {"dtype": "float32", "weight": AT, "bias": 0, "n": 8, "k": 8, "epilogue": "store"}
    return _host.CpuLinear(ENGINE, **{**arguments, **changes})  # type: ignore[arg-type]


def _pack_quantised(**changes: object) -> None:
    arguments = {
        "dtype": "float32",
        "storage": "q4",
        "q": AT,
        "scale": AT,
        "low": AT,
        "out": AT,
        "n": 1,
        "k": 32,
        "epilogue": "store",
    }
    _host.cpu_pack_quantised(ENGINE, **{**arguments, **changes})  # type: ignore[arg-type]


def _pages(**changes: object) -> _host.CpuPages:
    arguments = {
        "pool": PAGE.numpy(),
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 64,
        "block_size": 16,
        "dtype": "float32",
    }
    return _host.CpuPages(**{**arguments, **changes})  # type: ignore[arg-type]


BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "engine threads": ("num_threads", lambda: _host.CpuEngine(0)),
    "engine cpus": ("cpus", lambda: _host.CpuEngine(2, [0])),
    "engine cpu": ("cpus", lambda: _host.CpuEngine(2, [0, 100000])),
    "engine isa": ("isa", lambda: _host.CpuEngine(1, [], "mmx")),
    "linear dtype": ("dtype", lambda: _linear(dtype="int8")),
    "linear weight": ("weight", lambda: _linear(weight=0)),
    "linear shape": ("n and k", lambda: _linear(n=0)),
    "linear epilogue": ("epilogue", lambda: _linear(epilogue="relu")),
    "linear silu bias": ("epilogue", lambda: _linear(epilogue="silu_mul", bias=AT)),
    "linear storage": ("storage", lambda: _linear(storage="q5")),
    "linear quantised": ("quantised", lambda: _linear(storage="q4", k=32)),
    "linear unquantised": ("quantised", lambda: _linear(quantised=AT)),
    "linear groups": ("k of", lambda: _linear(storage="q4", quantised=AT, k=48)),
    "linear dtype of none": (
        "storage",
        lambda: _linear(dtype="float16", storage="q8", quantised=AT, k=32),
    ),
    "linear x": ("x and out", lambda: _linear()(0, AT, 1)),
    "linear rows": ("rows", lambda: _linear()(AT, AT, -1)),
    "norm weight": ("weight", lambda: _host.CpuRmsNorm(ENGINE, "float32", 0, 8, 1e-5)),
    "norm width": ("width", lambda: _host.CpuRmsNorm(ENGINE, "float32", AT, 0, 1e-5)),
    "norm x": ("x and out", lambda: _host.CpuRmsNorm(ENGINE, "float32", AT, 8, 1e-5)(0, AT, 1)),
    "embedding table": ("table", lambda: _host.CpuEmbedding(ENGINE, "float32", 0, 8, 8)),
    "embedding vocab": ("vocab_size", lambda: _host.CpuEmbedding(ENGINE, "float32", AT, 0, 8)),
    "embedding width": ("width", lambda: _host.CpuEmbedding(ENGINE, "float32", AT, 8, 0)),
    "pack weight": ("weight", lambda: _host.cpu_pack(ENGINE, "float32", 0, AT, 8, 8, "store")),
    "pack size": ("n and k", lambda: _host.cpu_packed_bytes("float32", 0, 8, "store")),
    "quantised dtype": ("dtype", lambda: ENGINE.quantised_rows("int8")),
    "quantised size": ("n and k", lambda: _host.cpu_quantised_bytes("q4", 8, 0, "store")),
    "quantised none": ("storage", lambda: _host.cpu_quantised_bytes("none", 8, 32, "store")),
    "quantised groups": ("k of", lambda: _host.cpu_quantised_bytes("q4", 8, 31, "store")),
    "pack quantised storage": ("storage", lambda: _pack_quantised(storage="none")),
    "pack quantised q": ("q, scale", lambda: _pack_quantised(q=0)),
    "pack quantised scale": ("q, scale", lambda: _pack_quantised(scale=0)),
    "pack quantised out": ("q, scale", lambda: _pack_quantised(out=0)),
    "pack quantised low": ("low", lambda: _pack_quantised(low=0)),
    "pack quantised low of 8": ("low", lambda: _pack_quantised(storage="q8")),
    "pack quantised size": ("n and k", lambda: _pack_quantised(n=0)),
    "pack quantised groups": ("k of", lambda: _pack_quantised(k=33)),
    "read address": ("address", lambda: _host.cpu_read(ENGINE, 0, 64)),
    "read size": ("num_bytes", lambda: _host.cpu_read(ENGINE, AT, -1)),
    "pages layers": ("num_layers", lambda: _pages(num_layers=0)),
    "pages heads": ("num_kv_heads", lambda: _pages(num_kv_heads=0)),
    "pages head_dim": ("head_dim", lambda: _pages(head_dim=72)),
    "pages block size": ("block_size", lambda: _pages(block_size=8)),
    "pages pool": ("pool", lambda: _pages(pool=bytes(1 << 16))),
    "pages small": ("pool", lambda: _pages(pool=bytearray(100))),
    "attention heads": ("num_heads", lambda: _attention(num_heads=3, num_kv_heads=2)),
    "attention head_dim": ("head_dim", lambda: _attention(head_dim=72)),
    "attention tables": ("cos and sin", lambda: _attention(cos=0)),
    "attention window": ("window", lambda: _attention(window=0)),
    "attention plan": ("plan", lambda: _attention().attend(_host.CpuPlan(), 0, AT, AT)),
    "plan starts": ("query_starts", lambda: _prepare(query_starts=[1, 2, 3])),
    "plan empty sequence": ("query_starts", lambda: _prepare(query_starts=[0, 0, 3])),
    "plan contexts": ("context_lens", lambda: _prepare(context_lens=[1, 5])),
    "plan positions": ("positions", lambda: _prepare(positions=[0, 1, 3])),
    "plan narrow table": (
        "block_table",
        lambda: _prepare(context_lens=[2, 17], positions=[0, 1, 16]),
    ),
    "plan negative block": ("block_table", lambda: _prepare(block_table=[0, -1])),
    "plan block too high": ("block_table", lambda: _prepare(block_table=[0, 8])),
    "copy dst_block_bytes": ("dst_block_bytes", lambda: _copy(dst_block_bytes=0)),
    "copy src_block_bytes": ("src_block_bytes", lambda: _copy(src_block_bytes=0)),
    "copy lengths": ("dst_ids", lambda: _copy(dst_ids=[])),
    "copy dst": ("dst ", lambda: _copy(dst=bytes(8))),
    "copy dst_ids": ("dst_ids", lambda: _copy(dst_ids=[2])),
    "copy src_ids": ("src_ids", lambda: _copy(src_ids=[-1])),
    "copy no bytes": ("runs", lambda: _copy(runs=[(0, 0, 0)])),
    "copy before dst": ("runs", lambda: _copy(runs=[(-1, 0, 1)])),
    "copy before src": ("runs", lambda: _copy(runs=[(0, -1, 1)])),
    "copy beyond dst": ("runs: one leaves the block of dst", lambda: _copy(runs=[(1, 0, 4)])),
    "copy beyond src": ("runs: one leaves the block of src", lambda: _copy(runs=[(0, 1, 2)])),
    "copy far": ("runs: one leaves", lambda: _copy(runs=[(1 << 62, 0, 1 << 62)])),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    name, call = BAD[case]
    with pytest.raises(ValueError, match=f"^{name}"):
        call()


def test_copy_blocks_moves_whole_blocks() -> None:
    src, dst = bytearray(range(60)), bytearray(80)
    _host.copy_blocks(dst, src, 10, 10, [(0, 0, 10)], [7, 1, 2, 0], [0, 3, 4, 5])
    assert dst[70:80] == src[:10]
    assert dst[10:30] == src[30:50]
    assert dst[:10] == src[50:60]
    assert dst[30:70] == bytes(40)


def test_copy_blocks_moves_runs_of_blocks_of_another_size() -> None:
    src, dst = bytearray(range(60)), bytearray(40)
    _host.copy_blocks(dst, src, 8, 20, [(1, 5, 2), (3, 7, 1), (6, 0, 2)], [4, 0], [2, 1])
    assert dst[32:40] == bytes([0, 45, 46, 47, 0, 0, 40, 41])
    assert dst[:8] == bytes([0, 25, 26, 27, 0, 0, 20, 21])
    assert dst[8:32] == bytes(24)


def test_pages_count_the_whole_blocks_of_their_pool() -> None:
    block_bytes = 2 * 2 * 3 * 32 * 64 * 2
    pages = _host.CpuPages(bytearray(3 * block_bytes + 5), 2, 3, 64, 32, "bfloat16")
    assert (pages.num_blocks, pages.block_bytes) == (3, block_bytes)
