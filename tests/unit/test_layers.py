"""Imports point down, files stay small: read off the syntax trees, lazy imports count."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nodeserve"
MAX_LINES = 400
LONGER: dict[str, str] = {}  # path: why it is one file

BASE = {
    *("errors", "types", "layout", "config", "metrics", "log"),
    *("gguf", "checkpoint", "model_files", "weight_files", "cuda_build", "gpus", "nvml"),
    *("socket_path", "blame", "config_readers", "shards", "expert_counts"),
}
MAY_IMPORT = {
    **{name: BASE for name in BASE},
    "wire": BASE | {"_host"},
    "policy": BASE,
    "text": BASE,
    "model": BASE | {"_host"},
    "profile_store": BASE | {"policy"},
    # Text is for the edge; a worker looks at it only where an answer is constrained.
    "worker": BASE | {"wire", "policy", "profile_store", "model", "text", "_cuda", "_host"},
    "coordinator": BASE | {"wire", "policy", "profile_store"},
    "client": BASE | {"wire", "text"},
    "plan": BASE | {"policy"},
    "loadgen": BASE | {"wire", "text", "client", "plan"},
    "views": BASE,
    "gateway": BASE | {"wire", "text", "client", "views"},
    "tracing": BASE | {"wire", "client"},
    "profiling": BASE | {"wire", "coordinator", "client", "plan", "policy", "profile_store"},
    "cli": BASE
    | {"wire", "coordinator", "client", "plan", "policy", "profile_store"}
    | {"loadgen", "profiling", "gateway", "tracing", "views"},
    "__main__": {"cli"},
    "__init__": {"client"},  # lazily, for `from nodeserve import Client`
}
MAY_NOT_USE = {
    "policy": {"torch", "asyncio", "time", "os", "socket"},
    "views": {"torch", "asyncio", "time", "os", "socket"},
    "wire": {"torch", "asyncio"},
    "worker": {"asyncio"},
    **{
        name: {"torch"}
        for name in (
            *BASE,
            *("text", "client", "coordinator", "plan", "profile_store"),
            *("loadgen", "profiling", "gateway", "tracing", "cli"),
        )
    },
}
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [
    path
    for folder in ("nodeserve", "tests", "bench", "csrc")
    for suffix in ("py", "cpp", "cu", "h", "pyi")
    for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> tuple[set[str], set[str]]:
    """First names below nodeserve ("__init__" for its own names), and foreign packages."""
    ours, theirs = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "nodeserve":
                ours.update(rest[:1] or ["__init__"])
            else:
                theirs.add(top)
    return ours, theirs


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours, theirs = imported(path)
    ours.discard("__version__")
    assert ours <= MAY_IMPORT[here] | {here}
    assert not theirs & MAY_NOT_USE.get(here, set())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_gpu_files_need_triton(path: Path) -> None:
    if "model/gpu" not in path.relative_to(PACKAGE).as_posix():
        assert "triton" not in imported(path)[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def modules_imported(path: Path) -> set[str]:
    """Our modules that a file names, wherever in it; a package stands for itself alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found.update(inside or {str(node.module)})
    return found & set(MODULES)


def test_no_files_import_each_other() -> None:
    """Lazy and type-checking imports count."""
    graph = {name: modules_imported(path) - {"nodeserve", name} for name, path in MODULES.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)  # or CycleError


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES or name_of(path) in LONGER, f"{lines} lines"


def test_exceptions_to_the_length_are_needed() -> None:
    for name in LONGER:
        assert len((ROOT / name).read_text().splitlines()) > MAX_LINES


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("from nodeserve import Client, AsyncClient", "torch nodeserve._host uvloop tokenizers"),
        (
            "import nodeserve.cli",
            "torch nodeserve._host uvloop tokenizers rich numpy starlette uvicorn",
        ),
        ("import nodeserve.coordinator.server", "torch tokenizers"),
        ("import nodeserve.loadgen.bench", "torch numpy uvloop rich tokenizers matplotlib aiohttp"),
        ("import nodeserve.loadgen.process, nodeserve.loadgen.socket_target", "aiohttp yarl"),
        (
            "import nodeserve.worker.device_sim, nodeserve.worker.process",
            "torch numpy asyncio gguf",
        ),
        ("import nodeserve.gateway.serve", "torch numpy tokenizers llguidance opentelemetry"),
        ("import nodeserve.worker.device_cpu", "triton nodeserve.model.gpu tokenizers llguidance"),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, forbidden: str) -> None:
    script = f"{statement}; import sys; print(*sorted(set({forbidden.split()}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
