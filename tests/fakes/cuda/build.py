"""Compiles and imports the fake `_cuda`."""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

import nodeserve

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent.relative_to(ROOT)
NAME = "nodeserve._cuda"


def sources() -> list[Path]:
    """Relative to the root, so that messages have the same paths as in the real build."""
    real = [path for path in sorted((ROOT / "csrc/kv").glob("*.c*")) if path.name != "bind.cpp"]
    return [path.relative_to(ROOT) for path in [*real, *sorted((ROOT / HERE).glob("*.cpp"))]]


def compile_flags() -> list[str]:
    includes = (HERE, HERE / "include", Path("csrc"))
    python = (Path(pybind11.get_include()), Path(sysconfig.get_path("include")))
    return [
        *("-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-pthread"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(f"-I{path}" for path in includes),
        *(f"-isystem{path}" for path in python),
    ]


def fingerprint() -> str:
    """Of everything that the module is made of."""
    folders = (ROOT / "csrc", ROOT / HERE)
    files = [
        p for folder in folders for p in folder.rglob("*") if p.suffix in {".cpp", ".h", ".cu"}
    ]
    parts = [sys.version, pybind11.__version__, *compile_flags()]
    for path in sorted(files):
        if "cpu" not in path.parts and "ring" not in path.parts:
            parts += [str(path), path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build() -> Path:
    """The path of the module; compiled first unless these very sources were compiled before."""
    folder = ROOT / "build/fake_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_cuda-{fingerprint()}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may start together
        if not module.exists():
            _compile(module, folder)
    return module


def _compile(module: Path, folder: Path) -> None:
    def compile_one(source: Path) -> Path:
        out = folder / f"{source.parent.name}-{source.name}.o"
        _run("g++", *compile_flags(), "-x", "c++", "-c", str(source), "-o", str(out))
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    unfinished = module.with_suffix(".new")
    _run("g++", "-shared", "-pthread", *map(str, objects), "-o", str(unfinished))
    unfinished.rename(module)


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load_fake_cuda() -> ModuleType:
    """The module, in this process and as `nodeserve._cuda`; a second call gives the same one."""
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        if not hasattr(loaded, "fake"):
            raise RuntimeError("the real nodeserve._cuda is loaded: load the fake one before it")
        return loaded
    path = str(build())
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[NAME] = module
    nodeserve._cuda = module
    return module
