"""A part of a trace as a picture, for pages where no viewer is at hand.

    python -m bench.trace_figure trace.json picture.svg [--from-ms 0] [--to-ms 400] [--requests 24]

Above the workers: passes by what was in them, gaps, copies of pages. Below the first requests that
arrived in that time, by stage.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodeserve.tracing.chrome import REQUESTS, WORKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, ROW_INCHES, EDGE_INCHES = 9.0, 0.16, 0.9
COLORS = {  # colours that stay apart for those who see few
    **{"prefill": "#d55e00", "decode": "#0072b2", "mixed": "#cc79a7", "empty": "#dddddd"},
    **{"bubble": "#f0e442", "blocked by pinned pages": "#e69f00", "copy": "#009e73"},
    **{"buffer": "#bbbbbb", "transit": "#888888", "device wait": "#f0e442", "return": "#888888"},
    **{"handoff wait": "#e69f00", "handoff": "#009e73"},
}
Event = dict[str, Any]


class Row:
    """One lane: its name and slices of (name, begin, length) in ms."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.slices: list[tuple[str, float, float]] = []


def rows_of(events: Iterable[Event], pid: int, from_ms: float, to_ms: float) -> list[Row]:
    """The lanes of a group that have something in that time, in their order."""
    names: dict[int, str] = {}
    places: dict[int, int] = {}
    rows: dict[int, Row] = {}
    for event in events:
        if event["pid"] != pid:
            continue
        if event["ph"] == "M" and event["name"] == "thread_name":
            names[event["tid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "thread_sort_index":
            places[event["tid"]] = event["args"]["sort_index"]
        elif event["ph"] == "X":
            begin_ms, length_ms = event["ts"] / 1e3, event["dur"] / 1e3
            if begin_ms < to_ms and begin_ms + length_ms > from_ms:
                row = rows.setdefault(event["tid"], Row(names[event["tid"]]))
                begin_ms = max(begin_ms, from_ms)
                row.slices.append((event["name"], begin_ms, length_ms))
    return [rows[tid] for tid in sorted(rows, key=lambda tid: places[tid])]


def draw(axes: "Axes", rows: list[Row], to_ms: float) -> set[str]:
    """One line for each row, the first on top; returns the kinds of slices."""
    kinds: set[str] = set()
    for place, row in enumerate(rows):
        named = [name if name in COLORS else "copy" for name, _, _ in row.slices]
        bars = [
            (begin_ms, min(length_ms, to_ms - begin_ms)) for _, begin_ms, length_ms in row.slices
        ]
        colors = [COLORS[kind] for kind in named]
        axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=colors, linewidth=0)
        kinds.update(named)
    axes.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return kinds


def save(path: Path, workers: list[Row], requests: list[Row], from_ms: float, to_ms: float) -> None:
    """The groups of lanes one above the other, on one axis of time; a legend of what is there."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = EDGE_INCHES + ROW_INCHES * (len(workers) + len(requests))
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    ratios = [max(1, len(workers)), max(1, len(requests))]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    kinds = draw(above, workers, to_ms) | draw(below, requests, to_ms)
    below.set(xlabel="ms", xlim=(from_ms, to_ms))
    known = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in kinds]
    figure.legend(handles=known, loc="outside upper center", ncols=6, fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="A part of a trace as a picture.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from-ms", type=float, default=0.0)
    parser.add_argument("--to-ms", type=float, default=400.0)
    parser.add_argument("--requests", type=int, default=24)
    options = parser.parse_args()
    events = json.loads(options.trace.read_text())["traceEvents"]
    span = options.from_ms, options.to_ms
    workers = rows_of(events, WORKERS, *span)
    requests = [row for row in rows_of(events, REQUESTS, *span) if row.slices[0][1] > span[0]]
    requests = requests[: options.requests]
    if not workers or not requests:
        raise SystemExit(f"{options.trace} has nothing from {span[0]:g} to {span[1]:g} ms")
    save(options.out, workers, requests, *span)


if __name__ == "__main__":
    main()
