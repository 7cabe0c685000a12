"""A layer's experts alone, against reading the matrices that were picked or computing with them.

`bench.gpu.experts` measures it; here its rows become lines. The aims are for the steps that say
most: decodes that are bound by reading, and the largest prefill.
"""

import torch

from bench.gpu import experts
from bench.gpu.attention import Ceilings
from bench.gpu.bed import Bed
from bench.gpu.experts import Experts, Row
from bench.gpu.lines import Line, share

READ_AIM, COMPUTE_AIM = 0.6, 0.4
TINY = (Experts("toy", 6, 4, 2, 48, 40, torch.float32),)


def run(bed: Bed) -> None:
    bed.prepare_kernels()
    ceilings = Ceilings(bed.ceiling("bandwidth_gb_s"), bed.ceiling("gemm_tflop_s"))
    models, tokens = bed.pick((experts.MODELS, experts.TOKENS), (TINY, (1, 20)))
    repeats = bed.pick(10, 2)
    for row in experts.bench(bed.device, ceilings, models, tokens, repeats):
        bed.sheet.add(line_of(row, bed))


def line_of(row: Row, bed: Bed) -> Line:
    """The ratio is the floor's share of the time."""
    aim = READ_AIM if row.reading else COMPUTE_AIM if row.num_tokens >= 8192 else None
    return share(
        f"experts of {row.experts.name}, {row.num_tokens} tokens",
        row.us,
        "us",
        row.share,
        None if aim is None else bed.aim(aim),
        "bound by reading" if row.reading else "bound by products",
        floor_us=row.floor_us,
        num_rows=row.num_rows,
    )
