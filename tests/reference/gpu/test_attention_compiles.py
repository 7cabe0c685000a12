"""Every row of the tile tables compiles and fits the chip. No GPU is needed for that."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from nodeserve.model.gpu.attention import latent_parts, tiles
from tests.reference.gpu.compile_attention import is_ordered

# Bytes of memory on the chip that one program may have. The table for compute capability 8.0 also
# serves 8.6, 8.9 and 12.0, which have the least.
LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SM_BYTES, SM_REGISTERS = 228 * 1024, 65536
RESERVED_BYTES = 1024  # of each program
# Bytes of stack for what a thread needs before and after its loops (Triton 3.7.1); others: none.
SPILLED = {
    (80, "prefill 4096 128 torch.bfloat16 page 16 window 4096"): 32,
    (90, "prefill 16 64 torch.float32 page 16 window None"): 8,
    (90, "prefill 4096 64 torch.float32 page 16 window None"): 8,
    (100, "latent decode 128 heads"): 56,
    (100, "latent prefill 128 heads"): 8,
}
PROGRAMS = {  # of a decode on a multiprocessor
    "latent decode 16 heads": latent_parts.ROOMY[0].programs_per_sm,
    "latent decode 128 heads": latent_parts.ROOMY[-1].programs_per_sm,
}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """One process: to import Triton takes as long as some kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference.gpu.compile_attention", *map(str, LIMITS)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)  # a compiler, many times
@pytest.mark.parametrize("arch", LIMITS)
def test_kernels_compile_and_fit(arch: int, compiled: list[dict[str, Any]]) -> None:
    lines = [line for line in compiled if line["arch"] == arch]
    assert len(lines) == (25 if arch == 90 else 11)
    for line in lines:
        assert line["shared"] <= LIMITS[arch], line
        assert line["stack"] <= SPILLED.get((arch, line["name"]), 0), line
        assert line["looped_spills"] == [], line
        assert line["looped_products"] > 0, line  # the loop over tiles was found
        if "float32" not in line["name"]:
            assert line["asynchronous"] > 0, line  # pages are on their way while others are used
        if "decode" in line["name"]:
            assert line["ordered"], line
            if arch == 90 and "float32" not in line["name"]:
                programs = PROGRAMS.get(line["name"], tiles.DECODE[128, 2].programs_per_sm)
                assert programs * (line["shared"] + RESERVED_BYTES) <= SM_BYTES, line
                assert programs * line["threads"] * line["registers"] <= SM_REGISTERS, line


def test_an_order_that_is_missing_is_noticed() -> None:
    """Of the line that the last program to arrive depends on."""
    store, wait, load = "st.global.b32 x", "bar.sync 0;", "ld.global.cg.b32 y"
    count = "atom.global.gpu.acq_rel.add.u32 z"
    assert is_ordered("\n".join([store, wait, count, wait, load]))
    for wrong in (
        [store, count, wait, load],
        [wait, store, count, wait, load],
        [store, wait, count, load],
        [store, wait, count, load, wait],
        [store, wait, count.replace("acq_rel", "relaxed"), wait, load],
    ):
        assert not is_ordered("\n".join(wrong))
