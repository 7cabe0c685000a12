"""Nothing is timed by the time of day, which people and daemons set: it is only shown."""

import ast
from pathlib import Path

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


def test_only_those_who_show_it_ask_for_the_time_of_day() -> None:
    """Others use time.monotonic or time.perf_counter."""
    found = {
        str(path.relative_to(PACKAGE)): uses(ast.parse(path.read_text()))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    asking = {name: lines for name, lines in found.items() if lines}
    assert asking.keys() == SHOWN.keys(), asking


def test_it_would_be_seen() -> None:
    for line in ("time.time()", "from time import time", "datetime.now()", "time.localtime(0)"):
        assert uses(ast.parse(line)) == [1]
    assert not uses(ast.parse("time.monotonic(); time.perf_counter(); from time import sleep"))
