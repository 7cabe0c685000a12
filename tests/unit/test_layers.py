"""Imports point down, files stay small: read off the syntax trees, lazy imports count."""

import ast
import functools
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


@functools.cache
def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """Each module that a file imports, and the names it takes from it; none: the module itself."""
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((str(node.module), [alias.name for alias in node.names]))
    return found


def imported(path: Path) -> tuple[set[str], set[str]]:
    """First names below nodeserve ("__init__" for its own names), and foreign packages."""
    ours, theirs = set(), set()
    for module, names in imports_of(path):
        for name in [f"{module}.{name}" for name in names] or [module]:
            top, *rest = name.split(".")
            if top == "nodeserve":
                ours.update(rest[:1] or ["__init__"])
            else:
                theirs.add(top)
    return ours, theirs


def misplaced(path: Path) -> set[str]:
    """What a file of the package imports and may not."""
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours, theirs = imported(path)
    up = ours - MAY_IMPORT[here] - {here, "__version__"}
    return up | theirs & MAY_NOT_USE.get(here, set())


# One test looks at all files: a test for each would take longer than the looking.
def test_imports_point_down() -> None:
    assert FILES and not {name_of(path): found for path in FILES if (found := misplaced(path))}


def test_only_gpu_files_need_triton() -> None:
    needing = [path for path in FILES if "triton" in imported(path)[1]]
    assert needing and not [
        path for path in needing if not path.is_relative_to(PACKAGE / "model/gpu")
    ]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def modules_imported(path: Path) -> set[str]:
    """Our modules that a file names, wherever in it; a package stands for itself alone."""
    found: set[str] = set()
    for module, names in imports_of(path):
        inside = {f"{module}.{name}" for name in names} & set(MODULES)
        found.update(inside or {module})
    return found & set(MODULES)


def test_no_files_import_each_other() -> None:
    """Lazy and type-checking imports count."""
    graph = {name: modules_imported(path) - {"nodeserve", name} for name, path in MODULES.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)  # or CycleError


def test_files_stay_small() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in ALL_FILES}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert lengths and long.keys() == LONGER.keys(), long


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
