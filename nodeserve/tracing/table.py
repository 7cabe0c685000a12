"""A trace's requests as CSV, without text: what bench, simulate and plan take as `--trace`.

Whoever arrived and ended within the trace is in it, if it had a token. The others are counted: of
those that were refused, or were still running, nobody knows how long their answers would have been.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from nodeserve.errors import ConfigError
from nodeserve.tracing.lanes import Lanes, RequestLane
from nodeserve.types import Timings

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "request", "reason", "ttft_s", "tpot_s")
TIMINGS = tuple(one.name for one in fields(Timings))


def write_csv(path: Path, lanes: Lanes) -> tuple[int, int]:
    """How many requests are in it, and how many that arrived are not."""
    rows = list(rows_of(lanes))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*COLUMNS, *TIMINGS), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror}") from None
    return len(rows), sum(lane.arrived is not None for lane in lanes.requests.values()) - len(rows)


def rows_of(lanes: Lanes) -> Iterator[dict[str, Any]]:
    """In the order of arrival; times to the microsecond."""
    for lane in lanes.requests.values():
        if lane.arrived is not None and lane.ended is not None and lane.ended.output_tokens:
            yield row_of(lane, lanes.began_s)


def row_of(lane: RequestLane, began_s: float) -> dict[str, Any]:
    arrived, ended = lane.arrived, lane.ended
    assert arrived is not None and ended is not None
    timings = Timings(**{name: ended.timings[name] for name in TIMINGS})
    gaps = ended.output_tokens - 1
    values = {
        "arrival_s": arrived.at_s - began_s,
        "input_tokens": ended.prompt_tokens,
        "output_tokens": ended.output_tokens,
        "request": lane.number,
        "reason": ended.reason,
        "ttft_s": timings.ttft_s,
        "tpot_s": timings.decode_s / gaps if gaps else math.nan,
        **{name: getattr(timings, name) for name in TIMINGS},
    }
    return {name: _cell(value) for name, value in values.items()}


def _cell(value: Any) -> Any:
    """Nothing for what there is not."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return value
