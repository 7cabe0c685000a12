"""Builds the C++ extensions. Everything else about the package stands in pyproject.toml.

`nodeserve._host` (rings, CPU kernels) needs a C++20 compiler and pybind11, never torch.

Switch (environment, 0 or 1): NODESERVE_SKIP_CUDA leaves the CUDA extension out. There is none
yet (docs/gpu.md), so both values build the same; anything else is refused.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

CPU_SOURCES = [
    "csrc/cpu/bind.cpp",
    "csrc/cpu/ops.cpp",
    "csrc/cpu/pack.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/team.cpp",
    "csrc/cpu/levels.cpp",
    "csrc/cpu/level_avx512bf16.cpp",
    "csrc/cpu/level_avx512.cpp",
    "csrc/cpu/level_avx2.cpp",
    "csrc/cpu/level_generic.cpp",
]
HOST_SOURCES = ["csrc/api_host.cpp", "csrc/ring/bind.cpp", *CPU_SOURCES]


def flag(name: str) -> bool:
    value = os.environ.get(name, "0").lower()
    if value not in {"0", "1", "false", "true"}:
        raise SystemExit(f"{name}={value!r}: use 0 or 1")
    return value in {"1", "true"}


def host_extension() -> Pybind11Extension:
    return Pybind11Extension(
        "nodeserve._host",
        HOST_SOURCES,
        include_dirs=["csrc"],
        cxx_std=20,
        # Products and sums fuse where a kernel says so and nowhere else: same bits in any tile.
        extra_compile_args=["-O3", "-g0", "-Wall", "-Wextra", "-ffp-contract=off"],
        extra_link_args=["-pthread"],
        depends=[str(path) for kind in ("*.h", "*.inl") for path in Path("csrc").rglob(kind)],
    )


flag("NODESERVE_SKIP_CUDA")
ParallelCompile("NODESERVE_BUILD_JOBS", default=2).install()
setup(ext_modules=[host_extension()], cmdclass={"build_ext": build_ext})
