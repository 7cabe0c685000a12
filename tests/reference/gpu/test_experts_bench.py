"""The arithmetic of the experts' benchmark, and its steps: they compute what is claimed."""

import pytest
import torch

import tests.fakes.interpreter  # noqa: F401  before the kernels
from bench.gpu import experts as bench
from bench.gpu.attention import Ceilings
from bench.gpu.experts import Experts

CEILINGS = Ceilings(copy_gb_s=4000.0, product_tflop_s=800.0)
TOY = Experts("toy", 6, 4, 2, 40, 24, torch.float32)


def test_the_floor_of_few_rows_is_reading_the_matrices_that_were_picked() -> None:
    """V2-Lite: 3 matrices of 2048 x 1408 values, and rows of both sizes."""
    lite = bench.MODELS[0]
    counts = torch.zeros(64, dtype=torch.int64)
    counts[:6] = 1
    num_bytes = 6 * 3 * 2048 * 1408 * 2 + 6 * (2 * 2048 * 2 + 6 * 1408 * 2)
    assert bench.visible_bytes(lite, counts) == num_bytes
    us, reading = bench.floor_us(lite, counts, CEILINGS)
    assert reading and us == pytest.approx(num_bytes / 4e12 * 1e6)


def test_the_floor_of_many_rows_is_the_products() -> None:
    lite = bench.MODELS[0]
    counts = torch.full((64,), 768)
    us, reading = bench.floor_us(lite, counts, CEILINGS)
    flops = 64 * 768 * 6 * 2048 * 1408
    assert not reading and us == pytest.approx(flops / 8e14 * 1e6)


def test_tokens_pick_different_experts_of_which_some_are_here() -> None:
    assert int(bench.draw_counts(bench.MODELS[0], 8, seed=1).sum()) == 8 * 6
    counts = bench.draw_counts(TOY, 300, seed=1)
    assert counts.shape == (4,) and int(counts.max()) <= 300
    assert abs(int(counts.sum()) - 300 * 2 * 4 / 6) < 60


def test_rows_are_of_the_layer_that_is_claimed() -> None:
    """Each draw's rows go through the experts that it says."""
    grouped = bench.random_experts(TOY, torch.device("cpu"))
    work = bench.Work(TOY, grouped, 9, torch.device("cpu"))
    work.run()
    assert [len(out) for out in work.out] == [int(counts.sum()) for counts in work.counts]
    assert all(out.shape[1] == TOY.hidden and out.isfinite().all() for out in work.out)
    [row] = bench.bench(torch.device("cpu"), CEILINGS, (TOY,), (9,), repeats=1)
    assert row.num_rows == sum(map(len, work.out)) // bench.NUM_DRAWS
    assert 0.0 < row.share < 1.0
