"""Builds the C++ and CUDA extensions. Everything else about the package stands in pyproject.toml.

`nodeserve._host` (rings, collectives, CPU kernels) needs a C++20 compiler and pybind11, no torch.
`nodeserve._cuda` (page pools, events, copies) needs nvcc 12.8 or newer besides, and no GPU. It is
left out where there is none; nodeserve/_cuda_build.json says so to `nodeserve.cuda_build`.

Switches (environment):
    NODESERVE_SKIP_CUDA    1 leaves the CUDA extension out
    NODESERVE_CUDA_ARCHS   what to compile for, "80;90;100"; the newest as PTX too
    CUDA_HOME              the toolkit to use; else nvcc of PATH, else /usr/local/cuda
    NODESERVE_BUILD_JOBS   how many files to compile at a time, 2
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

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
HOST_SOURCES = ["csrc/api_host.cpp", "csrc/ring/bind.cpp", "csrc/group/bind.cpp", *CPU_SOURCES]


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
        depends=[str(path) for path in headers("csrc/ring", "csrc/group", "csrc/cpu")],
    )


def headers(*folders: str) -> list[Path]:
    kinds = ("*.h", "*.inl")
    return [path for folder in folders for kind in kinds for path in Path(folder).rglob(kind)]


# ---- nodeserve._cuda

CUDA_SOURCES = [
    "csrc/api_cuda.cpp",
    "csrc/kv/bind.cpp",
    "csrc/kv/copy.cpp",
    "csrc/kv/copy_kernel.cu",
    "csrc/kv/copy_request.cpp",
    "csrc/kv/device.cpp",
    "csrc/kv/pool.cpp",
    "csrc/kv/stream.cpp",
]
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
OLDEST_TOOLKIT = (12, 8)  # the first with cudaMemcpyBatchAsync


class Unusable(Exception):
    """Why the CUDA extension is left out."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str
    archs: tuple[str, ...]  # "90"


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin/nvcc"
        if not nvcc.is_file():
            raise SystemExit(f"CUDA_HOME={home!r}: there is no bin/nvcc in it")
        return str(nvcc)
    found = shutil.which("nvcc") or shutil.which(USUAL_NVCC)
    if found is None:
        raise Unusable("no nvcc was found when nodeserve was built")
    return found


def wanted_archs() -> tuple[str, ...]:
    text = os.environ.get("NODESERVE_CUDA_ARCHS", "80;90;100")
    archs = tuple(text.split(";"))
    if not all(re.fullmatch(r"[1-9]\d{1,2}[af]?", arch) for arch in archs):
        raise SystemExit(f"NODESERVE_CUDA_ARCHS={text!r}: give numbers such as 80;90;100")
    return tuple(sorted(set(archs), key=lambda arch: int(arch.rstrip("af"))))


def find_toolkit() -> Toolkit:
    if flag("NODESERVE_SKIP_CUDA"):
        raise Unusable("nodeserve was built with NODESERVE_SKIP_CUDA=1")
    nvcc = find_nvcc()
    words = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", words)
    if match is None:
        raise SystemExit(f"{nvcc} --version does not say which release it is: {words!r}")
    version = f"{match[1]}.{match[2]}"
    if (int(match[1]), int(match[2])) < OLDEST_TOOLKIT:
        raise Unusable(f"the nvcc found when nodeserve was built is of CUDA {version}")
    return Toolkit(nvcc, version, wanted_archs())


def cuda_flags(toolkit: Toolkit) -> list[str]:
    host = [
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        *os.environ.get("CFLAGS", "").split(),
    ]
    newest = toolkit.archs[-1]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in toolkit.archs]
    return [
        *("-std=c++20", "-O3", "-Icsrc", "--forward-unknown-to-host-compiler"),
        *(f"-isystem={path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))),
        *(f"-Xcompiler={word}" for word in host),
        *(["-Werror=all-warnings"] if "-Werror" in host else []),
        *codes,
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def is_current(out: Path, command: list[str], inputs: list[Path]) -> bool:
    """Whether `out` was made by this very command from files that did not change since."""
    record = out.with_name(out.name + ".command")
    if not out.exists() or not record.exists() or record.read_text() != "\n".join(command):
        return False
    return all(path.stat().st_mtime <= out.stat().st_mtime for path in inputs)


def make(out: Path, command: list[str], inputs: list[Path]) -> None:
    if is_current(out, command, inputs):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"nodeserve._cuda could not be built; this failed: {' '.join(command)}")
    out.with_name(out.name + ".command").write_text("\n".join(command))


def build_cuda(toolkit: Toolkit, out: Path, objects_folder: Path) -> None:
    """Compile and link; nvcc does both, so that it finds its own headers and libraries."""
    includes = [*headers("csrc/kv"), Path("csrc/check.h")]

    def compile_one(source: str) -> Path:
        made = objects_folder / f"{source}.o"
        command = [toolkit.nvcc, *cuda_flags(toolkit), "-c", source, "-o", str(made)]
        make(made, command, [Path(source), *includes])
        return made

    with ThreadPoolExecutor(int(os.environ.get("NODESERVE_BUILD_JOBS", "2"))) as pool:
        objects = list(pool.map(compile_one, CUDA_SOURCES))
    # The runtime is linked in: nothing to find at run time but the driver, which it opens itself.
    # Its names stay inside, or those of a runtime that torch brings could take their place.
    hidden = "-Xlinker=--exclude-libs=ALL"
    linked = objects_folder / out.name
    link = [
        toolkit.nvcc,
        "-shared",
        "-cudart=static",
        "-nodlink",
        hidden,
        *map(str, objects),
        "-o",
        str(linked),
    ]
    make(linked, link, objects)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(linked, out)


class BuildExtensions(build_ext):
    """`_host` as setuptools does it, `_cuda` with nvcc, and the record of how that went."""

    toolkit: Toolkit | None = None
    reason = ""

    def finalize_options(self) -> None:
        try:
            self.toolkit = find_toolkit()
        except Unusable as error:
            self.reason = str(error)
            self.distribution.ext_modules = [
                module for module in self.distribution.ext_modules if module.name != CUDA_NAME
            ]
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA_NAME:
            super().build_extension(ext)
            return
        assert self.toolkit is not None
        out = Path(self.get_ext_fullpath(ext.name))
        build_cuda(self.toolkit, out, Path(self.build_temp) / "cuda")

    def run(self) -> None:
        super().run()
        folder = Path("nodeserve" if self.inplace else f"{self.build_lib}/nodeserve")
        if not self.toolkit:  # one of an earlier build would no longer fit the sources
            for stale in folder.glob("_cuda.*.so"):
                stale.unlink()
        record = {"reason": self.reason}
        if self.toolkit:
            record |= {"toolkit": self.toolkit.version, "archs": ";".join(self.toolkit.archs)}
        (folder / "_cuda_build.json").write_text(json.dumps(record) + "\n")


CUDA_NAME = "nodeserve._cuda"
ParallelCompile("NODESERVE_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[host_extension(), Extension(CUDA_NAME, CUDA_SOURCES)],
    cmdclass={"build_ext": BuildExtensions},
)
