"""One line of the table: what was checked, what came out, and whether that is enough.

A section runs in a process of its own and appends its lines to a file as they are known, so that
what it found before a crash is kept. Numbers that later sections divide by (the ceilings) travel
the same way.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, INFO, NOT_REACHED = "pass", "fail", "info", "not reached"
STATES = (PASS, FAIL, INFO, NOT_REACHED)
# More than this share of a ceiling means that the ceiling or the clock is wrong, not that we won.
MOST_OF_A_CEILING = 1.1


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table; `ratio` is a share of what could be had, or the factor of a comparison.

    "info" is a number that nobody set an aim for; it never stands for a check that was left out.
    """

    name: str
    state: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    aim: str = ""
    note: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r}: use one of {', '.join(STATES)}")

    @property
    def counts_against(self) -> bool:
        return self.state in (FAIL, NOT_REACHED)


def verdict(passed: bool) -> str:
    return PASS if passed else FAIL


def check(name: str, passed: bool, note: str = "", **numbers: Any) -> Line:
    """Something that is right or wrong."""
    return Line(name, verdict(passed), note=note, numbers=numbers)


def unrehearsed(name: str) -> Line:
    """A check that makes no sense without a GPU: not passed, and not the rehearsal's fault."""
    return Line(name, NOT_REACHED, note="only on a GPU")


def share(
    name: str,
    value: float,
    unit: str,
    ratio: float,
    least: float | None = None,
    note: str = "",
    **numbers: Any,
) -> Line:
    """A measured value and the share that it is of a ceiling; `least` is the aim, None: no aim."""
    if not math.isfinite(value) or not math.isfinite(ratio) or ratio <= 0:
        return Line(name, FAIL, note=f"not a measurement: {value} {unit}, share {ratio}")
    aim = "" if least is None else f">= {least:.0%}"
    if ratio > MOST_OF_A_CEILING:
        state, note = FAIL, f"above its ceiling: one of both is measured wrongly. {note}".strip()
    else:
        state = INFO if least is None else verdict(ratio >= least)
    return Line(name, state, value, unit, ratio, aim, note, numbers)


def at_most(
    name: str, value: float, unit: str, limit: float, note: str = "", **numbers: Any
) -> Line:
    """A value with an upper limit; the ratio is value / limit."""
    passed = math.isfinite(value) and value <= limit
    return Line(
        name, verdict(passed), value, unit, value / limit, f"<= {limit:g} {unit}", note, numbers
    )


def at_least(
    name: str, value: float, unit: str, limit: float, note: str = "", **numbers: Any
) -> Line:
    """A value with a lower limit; the ratio is value / limit."""
    passed = math.isfinite(value) and value >= limit
    return Line(
        name, verdict(passed), value, unit, value / limit, f">= {limit:g} {unit}", note, numbers
    )


# ---- the file between a section's process and the harness


class Sheet:
    """A section's own end of the file: every record is there before the next step begins."""

    def __init__(self, path: Path, quiet: bool = False) -> None:
        self._path = path
        self._quiet = quiet

    def add(self, *lines: Line) -> None:
        for line in lines:
            self._write({"line": asdict(line)})
            if not self._quiet:
                print(f"{line.state}: {line.name} {line.note}", flush=True)

    def keep(self, **numbers: Any) -> None:
        """Numbers for later sections and for the record."""
        self._write({"numbers": numbers})

    def end(self) -> None:
        """The section came to its end; without this it counts as crashed."""
        self._write({"end": True})

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


@dataclass(slots=True)
class Found:
    """What a section's file holds."""

    lines: list[Line] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    ended: bool = False


def read_sheet(path: Path) -> Found:
    """Everything a section wrote; a last record that was cut short is left out."""
    found = Found()
    for record in _records(path):
        if "line" in record:
            found.lines.append(Line(**record["line"]))
        found.numbers.update(record.get("numbers", {}))
        found.ended = found.ended or bool(record.get("end"))
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            return
