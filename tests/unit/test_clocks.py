"""Nothing is timed by the time of day, which people and daemons set: it is only shown."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nodeserve"
TIME_OF_DAY = {"time", "time_ns", "localtime", "gmtime", "ctime", "mktime", "strftime"}
DATES = {"now", "utcnow", "today"}
SHOWN = {  # who may ask for it, and what for
    "text/renderer.py": "chat templates may tell the model the date",
    "gateway/engine.py": "the model's entry in /v1/models",
    "gateway/routes.py": "`created` of an answer",
    "gateway/spans.py": "the times of OpenTelemetry's spans",
    "loadgen/fleet.py": "a number that no run before had",
}


def uses(tree: ast.AST) -> list[int]:
    """Lines that ask for the time of day."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (
                (node.value.id == "time" and node.attr in TIME_OF_DAY)
                or (node.value.id in ("datetime", "date") and node.attr in DATES)
            )
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "time"
            and any(alias.name in TIME_OF_DAY for alias in node.names)
        )
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_only_those_who_show_it_ask_for_the_time_of_day(path: Path) -> None:
    found = uses(ast.parse(path.read_text()))
    name = str(path.relative_to(PACKAGE))
    assert not found or name in SHOWN, f"{name}:{found}: use time.monotonic or time.perf_counter"


def test_it_would_be_seen() -> None:
    for line in ("time.time()", "from time import time", "datetime.now()", "time.localtime(0)"):
        assert uses(ast.parse(line)) == [1]
    assert not uses(ast.parse("time.monotonic(); time.perf_counter(); from time import sleep"))


def test_those_who_may_still_do() -> None:
    assert all(uses(ast.parse((PACKAGE / name).read_text())) for name in SHOWN)
