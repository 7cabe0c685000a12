"""The table that a person reads: one line per check, and one in the end."""

from collections import Counter
from collections.abc import Sequence

from bench.gpu.lines import FAIL, INFO, NOT_REACHED, PASS, Line
from bench.gpu.runner import Result

MARKS = {PASS: "pass", FAIL: "FAIL", INFO: "info", NOT_REACHED: "----"}
NAME_WIDTH, VALUE_WIDTH, AIM_WIDTH = 52, 18, 14


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def row(line: Line) -> str:
    """`pass  name  value unit  ratio  aim  note`, the note on a line of its own if there is one."""
    value = "" if line.value is None else f"{number(line.value)} {line.unit}"
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    text = (
        f"{MARKS[line.state]:5} {line.name:{NAME_WIDTH}} {value:>{VALUE_WIDTH}}"
        f" {ratio:>6} {line.aim:{AIM_WIDTH}}"
    ).rstrip()
    return f"{text}\n        {line.note}" if line.note else text


def section_rows(result: Result) -> str:
    heading = f"== {result.section.title} ({result.wall_s:.0f} s)"
    return "\n".join([heading, *map(row, result.lines)])


def against(results: Sequence[Result]) -> list[str]:
    """Everything that is not passed, once more, for who reads the end only."""
    rows = [
        f"      {MARKS[line.state]} {result.section.name}: {line.name}"
        for result in results
        for line in result.lines
        if line.counts_against
    ]
    return ["== not passed", *rows] if rows else []


def summary(results: Sequence[Result]) -> dict[str, int]:
    """How many lines ended in each state."""
    counts = Counter(line.state for result in results for line in result.lines)
    return {state: counts[state] for state in MARKS}


def succeeded(results: Sequence[Result]) -> bool:
    """Every check passed, and there was one."""
    lines = [line for result in results for line in result.lines]
    return any(line.state == PASS for line in lines) and not any(
        line.counts_against for line in lines
    )


def closing(results: Sequence[Result]) -> str:
    counts = summary(results)
    return (
        f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[NOT_REACHED]} not reached,"
        f" {counts[INFO]} numbers without an aim"
    )
