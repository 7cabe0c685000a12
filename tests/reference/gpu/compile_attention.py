"""Compiles the attention kernels for architectures that need not be there; one JSON line each.

Run as a process of its own: in a test process Triton may be set to interpret.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nodeserve.model.gpu.attention import latent_parts, tiles, triton_parts
from nodeserve.model.gpu.attention.kernel_decode import paged_decode
from nodeserve.model.gpu.attention.kernel_latent import latent_decode, latent_prefill
from nodeserve.model.gpu.attention.kernel_prefill import paged_prefill
from nodeserve.model.gpu.attention.parts import Heads
from tests.reference.gpu.cubin import LOCAL, PRODUCT, Flow, disassembled, resources

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
OTHER_TYPES = {
    **dict.fromkeys(["partials", "stats"], "*fp32"),
    **dict.fromkeys(["arrivals", "block_table", "context_lens", "query_starts"], "*i32"),
    **{"scale": "fp32", "block_stride": "i64"},
}
ALIGNED = {  # what a launch finds to be multiples of 16
    *("query", "pages", "out", "partials", "stats", "arrivals"),
    *("block_stride", "value_stride", "head_stride", "query_stride", "out_stride"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as a model would launch it."""

    name: str
    kernel: Any
    dtype: torch.dtype
    constants: dict[str, Any]


def variants(arch: int, heads: Heads, window: int | None) -> Iterator[Variant]:
    """The decode kernel and the prefill kernel with both of its tile sizes."""
    name = f"{heads.head_dim} {heads.dtype} page {heads.block_size} window {window}"
    sizes = tiles.decode_tiles(heads.head_dim, heads.dtype)
    constants = triton_parts.decode_constants(heads, sizes, 64, window)
    yield Variant(f"decode {name}", paged_decode, heads.dtype, constants)
    table = tiles.table_of(divmod(arch, 10))
    for num_rows in (16, 4096):
        chunk = tiles.prefill_tiles(table, heads.head_dim, heads.dtype, num_rows)
        constants = triton_parts.prefill_constants(heads, chunk, 64, window)
        yield Variant(f"prefill {num_rows} {name}", paged_prefill, heads.dtype, constants)


def latent_variants(arch: int, num_heads: int) -> Iterator[Variant]:
    """Both kernels over DeepSeek's latents, as a model with so many heads would launch them."""
    heads = latent_parts.LatentHeads(num_heads, 512, 64, 192**-0.5, 16, torch.bfloat16)
    sizes = latent_parts.tiles_of(heads.dtype, divmod(arch, 10))
    group = latent_parts.heads_in_block(num_heads, sizes)
    name = f"{num_heads} heads"
    chosen = latent_parts.fitting(sizes, group)
    constants = latent_parts.decode_constants(heads, chosen, group, 64)
    yield Variant(f"latent decode {name}", latent_decode, heads.dtype, constants)
    constants = latent_parts.common_constants(heads, sizes[-1], group, 64)
    yield Variant(f"latent prefill {name}", latent_prefill, heads.dtype, constants)


def compiled(variant: Variant, arch: int) -> Any:
    """What the launch of a variant would compile to."""
    names, constants = variant.kernel.arg_names, dict(variant.constants)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature = {}
    for name in names:
        pages = TYPES[variant.dtype] if name in ("query", "pages", "out") else "i32"
        signature[name] = "constexpr" if name in constants else OTHER_TYPES.get(name, pages)
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED & set(names)},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def is_ordered(ptx: str) -> bool:
    """Whether a program's splits are stored before it counts, and others' read after it did."""
    before, counted, after = ptx.partition("atom.global.gpu.acq_rel.add")
    stored = -1 < before.rfind("st.global") < before.rfind("bar.sync")
    return bool(counted) and stored and -1 < after.find("bar.sync") < after.find("ld.global.cg")


def main(arch: int) -> None:
    cases: list[tuple[Heads, int | None]]
    cases = [(Heads(32, 8, dim, 16, torch.bfloat16), 4096) for dim in (64, 128, 256)]
    if arch == 90:
        cases += [(Heads(32, 8, 128, size, torch.bfloat16), None) for size in (16, 256)]
        cases += [(Heads(40, 8, 80, 16, torch.float16), None)]
        cases += [(Heads(8, 4, 64, 16, torch.float32), None)]
    every = [one for heads, window in cases for one in variants(arch, heads, window)]
    for num_heads in (16, 128) if arch == 90 else (128,):
        every += latent_variants(arch, num_heads)
    for variant in every:
        built = compiled(variant, arch)
        flow = Flow.of(disassembled(built.asm["cubin"]))
        line: dict[str, Any] = {
            "arch": arch,
            "name": variant.name,
            "shared": built.metadata.shared,
            "threads": built.metadata.num_warps * 32,
            **resources(built.asm["cubin"]),
            "looped_spills": flow.repeated(LOCAL),
            "looped_products": len(flow.repeated(PRODUCT)),
            "asynchronous": built.asm["ptx"].count("cp.async.cg"),
        }
        if variant.kernel in (paged_decode, latent_decode):
            line["ordered"] = is_ordered(built.asm["ptx"])
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    for word in sys.argv[1:]:
        main(int(word))
