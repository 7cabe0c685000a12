"""Compiles kernels for GPUs that are not there, and prints what the assembler says of each.

Run as a program, without TRITON_INTERPRET: what is interpreted in this process cannot be compiled.
One JSON line per kernel, variant and architecture.
"""

import json
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nodeserve.model.gpu import experts, norm, pointwise, rope, sampling
from tests.reference.gpu.cubin import resources

ARCHITECTURES = (80, 90, 100)
ACTS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, slots=True)
class Case:
    """One way to call a kernel: its arguments' types, and the values that are compiled in."""

    kernel: Any
    types: dict[str, str]
    values: dict[str, Any]
    num_warps: int = 4

    def compile(self, arch: int) -> dict[str, Any]:
        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        assert set(names) == set(self.types) | set(self.values), names
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if signature[name].startswith("*")
        }
        source = ASTSource(self.kernel, signature, constexprs=self.values, attrs=aligned)
        made = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": self.num_warps}
        )
        return {
            "kernel": self.kernel.__name__,
            "variant": str({**self.types, **self.values}),
            "arch": arch,
            "shared_bytes": made.metadata.shared,
            **resources(made.asm["cubin"]),
        }


def cases() -> list[Case]:
    found = []
    for act in ACTS:
        for width, add in ((4096, True), (576, False)):
            types = {"delta": f"*{act}" if add else "*fp32", "hidden": "*fp32"}
            types |= {"weight": "*fp32", "normed": f"*{act}", "eps": "fp32"}
            block = triton.next_power_of_2(width)
            values = {"WIDTH": width, "BLOCK": block, "ADD": add}
            found.append(Case(norm.rms_norm_kernel, types, values, min(block // 256, 16)))
        types = {"gate_up": f"*{act}", "out": f"*{act}"}
        found.append(Case(pointwise.silu_mul_kernel, types, {"WIDTH": 14336, "TILE": 1024}))
        types = {"token_ids": "*i32", "table": f"*{act}", "out": "*fp32"}
        values = {"VOCAB": 128256, "WIDTH": 4096, "TILE": 1024}
        found.append(Case(pointwise.embedding_kernel, types, values))
        found.append(_rope_store(act, 128, qk_norm=False))
    found += [_rope_store("bf16", head_dim, qk_norm=True) for head_dim in (64, 80, 128, 256)]
    types = {"token_ids": "*i32", "feed": "*i32", "sampled": "*i32", "num_tokens": "i32"}
    found.append(Case(pointwise.feed_kernel, types, {"TILE": 1024}))
    types = {"query_starts": "*i32", "positions": "*i32", "block_table": "*i32", "slots": "*i32"}
    values = {"BLOCK_SIZE": 16, "TILE": 512}
    found.append(Case(rope.slots_kernel, types | {"width": "i32"}, values))
    found += [_grouped("bf16", rows) for rows in (16, 32, 64, 128)]
    found += [_grouped(act, rows) for act in ("fp16", "fp32") for rows in (16, 128)]
    for draw in (False, True):
        types = {"logits": "*fp32", "parameters": "*fp64" if draw else "*i32", "tokens": "*i32"}
        values = {"VOCAB": 128256, "TILE": 8192, "NUM_TILES": 16, "DRAW": draw, "PARAMETERS": 5}
        found.append(Case(sampling.choose_kernel, types, values, 16))
    return found


def _grouped(act: str, rows: int) -> Case:
    types = {"x": f"*{act}", "weight": f"*{act}", "counts": "*i64", "out": f"*{act}"}
    values: dict[str, Any] = {
        "WIDTH": 1536,
        "DEPTH": 2048,
        "GROUPS": 128,
        "ROWS": rows,
        "COLUMNS": 128,
    }
    values |= {"STEP": 32 if act == "fp32" else 64, "PRECISION": "ieee"}
    types |= {"num_groups": "i32"}
    return Case(experts.grouped_kernel, types, values, 8 if rows > 64 else 4)


def _rope_store(act: str, head_dim: int, qk_norm: bool) -> Case:
    types = {"qkv": f"*{act}", "positions": "*i32", "slots": "*i32", "cos": "*fp32"}
    types |= {"sin": "*fp32", "q_norm": "*fp32", "k_norm": "*fp32", "query": f"*{act}"}
    types |= {"pages": f"*{act}", "block_stride": "i32", "eps": "fp32"}
    half = triton.next_power_of_2(head_dim // 2)
    values = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "BLOCK_SIZE": 16}
    values |= {"QK_NORM": qk_norm, "HEADS": 1024 // half, "HALF": half}
    return Case(rope.rope_store_kernel, types, values)


if __name__ == "__main__":
    for case in cases():
        for arch in ARCHITECTURES:
            print(json.dumps(case.compile(arch)), flush=True)
