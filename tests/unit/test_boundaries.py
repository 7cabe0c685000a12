"""Nothing that the package reads can run: seen from the syntax trees of all its files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nodeserve"
FILES = sorted(PACKAGE.rglob("*.py"))

# Reading these may run any program, or they carry such data between processes.
UNSAFE_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("multiprocessing", "concurrent.futures.process", "code", "codeop", "runpy", "yaml"),
}
UNSAFE_NAMES = {"ProcessPoolExecutor"}  # from concurrent.futures
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "torch.hub", "numpy.load", "np.load", "jit.load"),
    *("os.system", "os.popen", "ctypes.pythonapi"),
}
UNSAFE_WORDS = {"trust_remote_code", "allow_pickle", "weights_only", "shell"}
# Parent and child of one command and one commit, over pipes that nobody else can open.
AMONG_OURSELVES = {
    "loadgen/process.py": "a benchmark's client processes",
    "plan/pool.py": "a search's helpers",
}


def refused(keyword: ast.keyword) -> bool:
    """Whether it says no, in so many words, to what others may say yes to."""
    no = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    return no and keyword.arg == "trust_remote_code"


def names_of(node: ast.AST) -> Iterator[str]:
    """What a piece of syntax imports, calls or passes by a name that could be unsafe."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names):
            yield str(module)
            yield from (f"{module}.{alias.name}" for alias in names)
            yield from (alias.name for alias in names if alias.name in UNSAFE_NAMES)
        case ast.Call(func=function, keywords=keywords):
            name = ast.unparse(function)
            yield name if "." not in name else ".".join(name.split(".")[-2:])
            yield from (f"{keyword.arg}=" for keyword in keywords if not refused(keyword))
        case ast.Constant(value=str(text)) if text in UNSAFE_WORDS:
            yield f"{text}="


def unsafe(text: str) -> set[str]:
    found = {name for node in ast.walk(ast.parse(text)) for name in names_of(node)}
    modules = {name for name in found if unsafe_module(name)}
    words = {name for name in found if name.removesuffix("=") in UNSAFE_WORDS and "=" in name}
    return modules | words | (found & (UNSAFE_CALLS | UNSAFE_NAMES))


def unsafe_module(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in UNSAFE_MODULES for length in range(1, len(parts) + 1))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import dill",
        "import multiprocessing.connection",
        "from concurrent.futures import ProcessPoolExecutor",
        "torch.load(path)",
        "numpy.load(path)",
        "eval(text)",
        "exec(text)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=told)",
        "f(weights_only=False)",
        "f(**{'trust_remote_code': True})",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_what_is_unsafe_is_found(text: str) -> None:
    assert unsafe(text)


def test_nothing_that_is_read_can_run() -> None:
    seen = {str(path.relative_to(PACKAGE)): unsafe(path.read_text()) for path in FILES}
    found = {name: names for name, names in seen.items() if names}
    assert found.keys() == AMONG_OURSELVES.keys(), found


def test_templates_are_run_in_one_place_and_in_the_sandbox() -> None:
    importing = [
        path
        for path in FILES
        if "jinja2" in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] == "jinja2" for name in names_of(node))
    ]
    assert {path.name for path in importing} == {"renderer.py"}
    tree = ast.parse((PACKAGE / "text" / "renderer.py").read_text())
    made = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    environments = {name for name in made if name.endswith(("Environment", "Template"))}
    assert environments == {"ImmutableSandboxedEnvironment"}
