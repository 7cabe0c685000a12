"""Attention alone, every kernel that is here, against the ceilings of this run.

`bench.gpu.attention` measures it; here its rows become lines. Aims are for the kernels that the
choice would take: the first of each phase, and ours over latents with few heads.
"""

from bench.gpu import attention, latents
from bench.gpu.attention import Ceilings, Row
from bench.gpu.bed import Bed
from bench.gpu.lines import Line, share

DECODE_AIM = 0.8
LATENTS_AIM = 0.6  # a latent is read once, but used by 16 rows of 576: tensor cores wait for it too
AIMED = ("decode", 64, 8192)  # phase, sequences, context


def run(bed: Bed) -> None:
    bed.prepare_kernels()
    ceilings = Ceilings(bed.ceiling("bandwidth_gb_s"), bed.ceiling("gemm_tflop_s"))
    first: dict[str, str] = {}
    steps, repeats = bed.pick(attention.STEPS, attention.TOY), bed.pick(10, 1)
    for row in attention.bench(bed.device, ceilings, steps, repeats=repeats):
        chosen = first.setdefault(row.phase, row.kind) == row.kind
        bed.sheet.add(line_of(row, DECODE_AIM if chosen else None))
    fewest = latents.NUM_HEADS[0]
    over_latents = bed.pick(latents.STEPS, latents.TOY)
    for row in latents.bench(bed.device, ceilings, over_latents, repeats=repeats):
        aimed = row.kind.endswith(f" {fewest} heads")
        bed.sheet.add(line_of(row, LATENTS_AIM if aimed else None))


def line_of(row: Row, aim: float | None) -> Line:
    """The aim counts for the one step that says most."""
    aimed = (row.phase, row.num_seqs, row.context_len) == AIMED
    return share(
        f"{row.phase} {row.num_seqs} x {row.query_len} of {row.context_len}, {row.kind}",
        row.achieved,
        "GB/s" if row.phase == "decode" else "TFLOP/s",
        row.share,
        aim if aimed else None,
        us=row.us,
    )
