"""The node as metrics: known numbers, and boards and pages that name what there is."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodeserve.blame import WORDS
from nodeserve.gateway.meters import Meters
from nodeserve.gateway.node_metrics import node_text
from tests.fakes.answers import Stats, answer, span, worker

DOCS = Path(__file__).parents[2] / "docs"
BOARD = json.loads((DOCS / "grafana" / "nodeserve.json").read_text())
ABOUT = {"model": "m", "block_size": 16, "version": "1"}
NAME = re.compile(r"\b(?:nodeserve_|vllm:)[a-z_]+")
GRID_WIDTH = 24


def samples(stats: Stats | None) -> dict[str, float]:
    """By name and the values of the labels, in the order of the labels' names."""
    text = node_text(None if stats is None else ABOUT, stats).decode()
    families = list(text_string_to_metric_families(text))
    assert len({one.name for one in families}) == len(families), "each has one heading"
    return {
        "/".join([one.name, *(value for _, value in sorted(one.labels.items()))]): one.value
        for family in families
        for one in family.samples
    }


def busy_node() -> Stats:
    """Something of everything."""
    spans = [span(10, 50, handoff_wait=31, buffer=19), span(60), span(300, 100)]
    spans[0]["ttft_ms"] = {"count": 9, "p50": 100.0, "p90": 250.0, "p99": 400.0}
    told = answer(100.0, spans, layout="1p1d")
    told["goodput"]["total"] = {"offered": 130, "good": 70, "missed": {"buffer": 60}}
    told["dispatch"] |= {
        **{"departures": 17, "window_ms": 25.0},
        "passes": {"num": 5, "seconds": 2.5, "tokens": 300, "room": 400, "balance": 4.5},
    }
    told["workers"] = [
        worker(0, "prefill", free_blocks=30, pinned_blocks=20, busy_s=4.5, prompt_tokens=99),
        worker(1, "decode")
        | {
            **{"handoffs": 7, "handoff_bytes": 700, "handoff_s": 0.5, "restarts": 2},
            **{"reason": "was killed " * 40, "acting": "mixed", "state": "starting"},
            "ring": {
                **{"to_bytes": 5, "to_queued": 6, "to_stalls": 7},
                **{"from_bytes": 8, "from_stalls": 9, "capacity_bytes": 1000},
            },
        },
    ]
    return told


def test_goodput_in_numbers() -> None:
    found = samples(busy_node())
    prefix = "nodeserve_slo"
    assert found[f"{prefix}_offered_requests_total"] == 130
    assert found[f"{prefix}_good_requests_total"] == 70
    missed = {word: found[f"{prefix}_missed_requests_total/{word}"] for word in WORDS}
    assert missed == {**dict.fromkeys(WORDS, 0), "buffer": 60}, "also those that never were"
    assert found[f"{prefix}_attainment/10s"] == 0.5 and found[f"{prefix}_attainment/300s"] == 1.0
    assert f"{prefix}_attainment/60s" not in found, "nobody had an SLO"
    assert found["nodeserve_goodput_requests_per_second/10s"] == 5.0
    assert found["nodeserve_ended_requests_per_second/10s"] == 10.0
    assert found["nodeserve_ttft_seconds/0.9/10s"] == 0.25
    assert found["nodeserve_tpot_seconds/0.99/60s"] == 0.003
    assert "nodeserve_ttft_seconds/0.9/60s" not in found


def test_passes_and_departures_are_sums() -> None:
    found = samples(busy_node())
    assert found["nodeserve_departures_total"] == 17
    assert found["nodeserve_prefill_passes_total"] == 5
    assert found["nodeserve_prefill_pass_seconds_total"] == 2.5
    assert found["nodeserve_prefill_pass_tokens_total"] == 300
    assert found["nodeserve_prefill_pass_room_tokens_total"] == 400
    assert found["nodeserve_prefill_pass_balance_sum_total"] == 4.5
    assert found["nodeserve_window_seconds"] == 0.025


def test_workers_rings_and_lives() -> None:
    found = samples(busy_node())
    first, second = "0/prefill/0", "1/decode/1"
    states = ("free", "pinned", "active")
    blocks = [found[f"nodeserve_worker_kv_blocks/{first[:-2]}/{state}/0"] for state in states]
    assert blocks == [30, 20, 50]
    assert found[f"nodeserve_worker_busy_seconds_total/{first}"] == 4.5
    assert found[f"nodeserve_worker_prompt_tokens_total/{first}"] == 99
    assert found[f"nodeserve_worker_handoff_seconds_total/{second}"] == 0.5
    assert found[f"nodeserve_worker_ring_bytes/to/{second}"] == 5
    assert found[f"nodeserve_worker_ring_bytes/from/{second}"] == 8
    assert found[f"nodeserve_worker_ring_stalls_total/to/{second}"] == 7
    assert found[f"nodeserve_worker_ring_stalls_total/from/{second}"] == 9
    assert found[f"nodeserve_worker_ring_queued_records/{second}"] == 6
    assert found[f"nodeserve_worker_ring_capacity_bytes/{second}"] == 1000
    assert found["nodeserve_worker_info/mixed/1/decode/starting/1"] == 1
    assert found[f"nodeserve_worker_ready/{second}"] == 0
    (end,) = (name for name in found if name.startswith("nodeserve_worker_last_end_info"))
    assert "/1/was killed was killed" in end and len(end) < 200
    assert found["nodeserve_loop_lag_seconds"] == 0.007 and found["nodeserve_ready"] == 1


def test_without_a_server_there_is_only_that() -> None:
    assert samples(None) == {"nodeserve_up": 0.0}


def test_an_idle_node_has_no_number_that_is_none() -> None:
    found = samples(answer())
    assert found["nodeserve_up"] == 1 and not any(map(math.isnan, found.values()))


# ---- the board and the page of names


def every_name() -> set[str]:
    """Of all samples that a scrape can have."""
    text = Meters().text().decode() + node_text(ABOUT, busy_node()).decode()
    names: set[str] = set()
    for family in text_string_to_metric_families(text):
        names.update(one.name for one in family.samples)
        # One with labels has no sample before its first event.
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        names.update(family.name + ending for ending in endings.get(family.type, [""]))
    return names


def panels() -> Iterator[dict[str, Any]]:
    for panel in BOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def test_the_board_names_nothing_that_is_not_there() -> None:
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    used |= set(NAME.findall(json.dumps(BOARD["templating"])))
    assert len(used) > 30 and used <= every_name()


@pytest.mark.parametrize("expression", expressions())
def test_every_question_is_about_the_chosen_nodes(expression: str) -> None:
    for one in NAME.finditer(expression):
        assert expression[one.end() :].startswith('{instance=~"$instance"'), one.group()
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


def test_the_board_has_room_for_each_panel_and_names_each() -> None:
    taken: dict[tuple[int, int], int] = {}
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        place = panel["gridPos"]
        assert panel["title"] and 0 <= place["x"] <= place["x"] + place["w"] <= GRID_WIDTH
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"]


def test_the_page_lists_every_name_of_ours_and_no_other() -> None:
    text = (DOCS / "observability.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    listed = {
        name for line in text.splitlines() if line.startswith("| `") for name in NAME.findall(line)
    }
    ours = {name for name in every_name() if name.startswith("nodeserve_")}
    assert listed == {name for name in ours if not name.endswith(("_bucket", "_sum", "_count"))}
