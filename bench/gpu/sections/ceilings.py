"""What this card gives at best, measured before anything is divided by it.

Bandwidth is the better of a large copy (bytes read and written) and a large reduction (bytes read):
decode reads far more than it writes. The matrix rate is that of large square products of random
numbers: on zeros the card runs faster than it ever will on a model.
"""

import torch

from bench.floors import linear_shapes
from bench.gpu.bed import Bed
from bench.gpu.lines import Line, check
from bench.gpu.measure import median_s


def run(bed: Bed) -> None:
    copy, read = copy_gb_s(bed), read_gb_s(bed)
    gemm = gemm_tflop_s(bed, *bed.pick((8192, 8192, 8192), (64, 64, 64)))
    shapes = {
        f"{n}x{k}": gemm_tflop_s(bed, bed.pick(8192, 64), n, k) for n, k in linear_shapes(bed.model)
    }
    bed.sheet.keep(
        copy_gb_s=copy,
        read_gb_s=read,
        bandwidth_gb_s=max(copy, read),
        gemm_tflop_s=gemm,
        gemm_of_shapes_tflop_s=shapes,
    )
    bed.sheet.add(
        number("copy on the device, read + written", copy, "GB/s"),
        number("reduction, read only", read, "GB/s"),
        number(f"matrix product, large squares, {bed.dtype_name}", gemm, "TFLOP/s"),
        number("matrix product, the model's shapes, slowest", min(shapes.values()), "TFLOP/s"),
        check("the card was measured", min(copy, read, gemm, *shapes.values()) > 0),
    )


def number(name: str, value: float, unit: str) -> Line:
    return Line(name, "info", value, unit)


def copy_gb_s(bed: Bed) -> float:
    num_bytes = bed.pick(4 << 30, 1 << 20)
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=bed.device).normal_()
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), bed.device, bed.pick(10, 2))
    return float(2 * num_bytes / seconds / 1e9)


def read_gb_s(bed: Bed) -> float:
    """The best of several reductions: which one is fastest differs between versions of torch."""
    num_bytes = bed.pick(4 << 30, 1 << 20)
    values = torch.empty(num_bytes // 4, dtype=torch.float32, device=bed.device).normal_()
    rows = values.view(bed.pick(1 << 14, 16), -1)
    calls = (values.sum, values.amax, lambda: rows.sum(dim=1))
    return float(
        max(num_bytes / median_s(call, bed.device, bed.pick(10, 2)) / 1e9 for call in calls)
    )


def gemm_tflop_s(bed: Bed, m: int, n: int, k: int) -> float:
    x = torch.randn(m, k, device=bed.device, dtype=bed.dtype)
    weight = torch.randn(n, k, device=bed.device, dtype=bed.dtype)
    out = torch.empty(m, n, device=bed.device, dtype=bed.dtype)
    seconds = median_s(lambda: torch.mm(x, weight.t(), out=out), bed.device, bed.pick(20, 2))
    return 2 * m * n * k / seconds / 1e12
