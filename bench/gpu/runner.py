"""Runs sections as processes, each in its own group, and keeps what they found before their end.

A section that crashes, hangs or takes the CUDA context with it costs its own lines only: the
harness never loads torch and holds nothing on the card.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.lines import FAIL, NOT_REACHED, Found, Line, read_sheet
from bench.gpu.plan import MAX_BESIDE, Section, time_for, waves

GRACE_S = 3.0  # between asking a section to end and ending it
NOTE_CHARS = 300


@dataclass(slots=True)
class Result:
    """One section's part of the record."""

    section: Section
    lines: list[Line]
    numbers: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """How sections are started: the command before their own arguments, and where they write."""

    folder: Path
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    command: Sequence[str] = (sys.executable, "-m", "bench.gpu.section")


class Runs:
    """A run over all sections; `on_result` sees each as it ends, one at a time."""

    def __init__(
        self,
        task: Task,
        budget_s: float,
        on_result: Callable[[Result], None],
        patience: float = 1.0,
    ) -> None:
        """patience: how much slower than the target a machine may be before sections are ended."""
        self._task = task
        self._patience = patience
        self._give_up_s = time.monotonic() + budget_s
        self._on_result = on_result
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()

    def run(self, sections: Sequence[Section]) -> None:
        for wave in waves(sections):
            with ThreadPoolExecutor(MAX_BESIDE) as pool:
                for future in [pool.submit(self._one, section) for section in wave]:
                    future.result()

    def _one(self, section: Section) -> None:
        result = self._result(section)
        with self._lock:
            self._known.update(result.numbers)
            self._on_result(result)

    def _result(self, section: Section) -> Result:
        left_s = (self._give_up_s - time.monotonic()) / self._patience
        limit_s = time_for(section, left_s)
        if limit_s is None:
            note = f"the time was used up before it; it needs {section.least_s:g} s at least"
            return Result(section, [Line(section.title, NOT_REACHED, note=note)])
        limit_s *= self._patience
        sheet, log = (self._task.folder / f"{section.name}.{kind}" for kind in ("jsonl", "log"))
        sheet.unlink(missing_ok=True)
        with self._lock:
            known = json.dumps(self._known)
        began_s = time.monotonic()
        code = self._process(section, sheet, log, known, limit_s)
        wall_s = time.monotonic() - began_s
        found = read_sheet(sheet)
        lines = [*found.lines, *problems(section, found, code, limit_s, last_words(log))]
        return Result(section, lines, found.numbers, wall_s)

    def _process(
        self, section: Section, sheet: Path, log: Path, known: str, limit_s: float
    ) -> int | None:
        """The exit code; None when its time was up."""
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                [*self._task.command, section.name, str(sheet), *self._task.arguments],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self._task.environment},
            )
            try:
                process.communicate(known.encode(), timeout=limit_s)
                return process.returncode
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_group(process)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a section and everything it started: politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def problems(
    section: Section, found: Found, code: int | None, limit_s: float, words: str
) -> list[Line]:
    """A failed line for a section that did not come to its end, or that found nothing."""
    if code is None:
        note = f"ended after {limit_s:.0f} s, its limit. {words}"
    elif code != 0 or not found.ended:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        note = f"{how}. {words}"
    elif not found.lines:
        note = "it ended without a single line"
    else:
        return []
    return [Line(section.title, FAIL, note=note.strip())]


def last_words(log: Path) -> str:
    """The last line that says something, of what a section wrote; the log has the rest."""
    texts = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for text in reversed(texts):
        if text.strip():
            return text.strip()[:NOTE_CHARS]
    return ""
