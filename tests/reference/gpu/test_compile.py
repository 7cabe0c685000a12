"""Every kernel compiles for the GPUs we build for, on a machine that has none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from nodeserve.model.gpu import experts, norm, pointwise, rope, sampling

ROOT = Path(__file__).parents[3]
ARCHITECTURES = {80, 90, 100}


def test_every_kernel_compiles_for_every_architecture_without_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference.gpu.compiling"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    modules = (experts, norm, pointwise, rope, sampling)
    kernels = {name for one in modules for name in vars(one) if name.endswith("_kernel")}
    assert {(one["kernel"], one["arch"]) for one in made} == {
        (kernel, arch) for kernel in kernels for arch in ARCHITECTURES
    }
    assert not [one for one in made if one["stack"]], "registers spilled"
