"""`nodeserve status --health` and `--audit` against a scripted server: words and exit codes."""

import asyncio
import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nodeserve.cli import main
from nodeserve.cli.verdicts import audit_lines
from nodeserve.client import Audit
from tests.fakes.server import FakeServer
from tests.unit.test_cli_talk import STATS

ROW: dict[str, Any] = {
    **{"index": 1, "role": "decode", "num_blocks": 64, "free_blocks": 60, "held_blocks": 4},
    **{"waiting": 0, "running": 1, "pulling": 2, "pinned": 0, "preempted": 0},
    **{"records_to_it": 12, "records_from_it": 34},
}


async def run(server: FakeServer, *arguments: str) -> Result:
    command = ["status", *arguments, "--socket", str(server.path)]
    return await asyncio.to_thread(CliRunner().invoke, main, command)


@pytest.mark.parametrize(
    ("health", "code", "words"),
    [
        ({"state": "ready", "ready": True, "reasons": []}, 0, "ready"),
        ({"state": "degraded", "ready": True, "reasons": ["a", "b"]}, 0, "degraded: a; b"),
        ({"state": "not ready", "ready": False, "reasons": ["a"]}, 1, "not ready: a"),
        ({"state": "stopping", "ready": False, "reasons": ["a"]}, 1, "stopping: a"),
    ],
)
async def test_health_is_a_line_and_an_exit_code(
    server: FakeServer, health: dict[str, Any], code: int, words: str
) -> None:
    server.health = health
    result = await run(server, "--health")
    assert (result.exit_code, result.stdout) == (code, words + "\n")
    told = await run(server, "--health", "--json")
    assert told.exit_code == code and json.loads(told.stdout)["reasons"] == health["reasons"]


async def test_an_audit_that_adds_up(server: FakeServer) -> None:
    server.audit = {"problems": [], "requests": {"decode": 1, "moving": 2}, "workers": [ROW]}
    result = await run(server, "--audit")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "adds up  requests: 1 decode, 2 moving",
        "worker 1 (decode)  64 blocks: 60 free, 4 held  requests: 1 running, 2 pulling"
        "  records: 12 to it, 34 from it",
    ]


async def test_an_audit_that_does_not(server: FakeServer) -> None:
    server.audit = {"problems": ["one block is nobody's"], "requests": {}, "workers": []}
    result = await run(server, "--audit")
    assert result.exit_code == 1
    assert result.stdout == "does not add up\n  one block is nobody's\n"
    told = await run(server, "--audit", "--json")
    assert told.exit_code == 1 and json.loads(told.stdout)["adds_up"] is False


def test_a_node_at_rest_is_told_in_words() -> None:
    rest = {**ROW, "running": 0, "pulling": 0}
    lines = audit_lines(Audit((), {}, [rest]))
    assert lines[0] == "adds up  requests: none" and "requests: none" in lines[1]


async def test_one_question_at_a_time(server: FakeServer) -> None:
    result = await run(server, "--audit", "--health")
    assert result.exit_code == 2 and "ask one at a time" in result.stderr


async def test_status_tells_only_what_is_not_well(server: FakeServer) -> None:
    server.stats = STATS
    assert "health" not in (await run(server)).stdout
    degraded = {"state": "degraded", "reasons": ["worker 2 is away"]}
    server.stats = {**STATS, "health": {**STATS["health"], **degraded}}
    assert "health    degraded: worker 2 is away" in (await run(server)).stdout.splitlines()
