"""`nodeserve experts` against a scripted server: the words, the file, and what it refuses."""

import asyncio
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from nodeserve.cli import main
from nodeserve.expert_counts import facts_of, read_counts
from nodeserve.wire.numbers import pack_counts, pack_ids
from tests.fakes.server import FakeServer
from tests.unit.test_expert_counts import MODEL


def rank(instance: int, experts: list[int], ranks: list[int]) -> dict[str, Any]:
    """One that has layers 1 and 2, of which it used the second only."""
    return {
        **{"worker": 0, "instance": instance, "role": "mixed", "shape": "ep2", "num_ranks": 2},
        "layers": pack_ids([1, 2]),
        "experts": pack_counts([*[0] * 6, *experts]),
        "ranks": pack_counts([0, 0, *ranks]),
    }


async def run(server: FakeServer, *arguments: str) -> Result:
    command = ["experts", *arguments, "--socket", str(server.path)]
    return await asyncio.to_thread(CliRunner().invoke, main, command)


def answer(*ranks: dict[str, Any], silent: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"model": facts_of(MODEL), "ranks": list(ranks), "silent": list(silent)}


async def test_how_busy_ranks_were_and_would_have_been(server: FakeServer, tmp_path: Path) -> None:
    server.experts = answer(
        rank(0, [60, 5, 5, 5, 5, 0], [70, 10]),
        rank(0, [20, 5, 5, 5, 5, 0], [30, 10]),
        rank(1, [0, 0, 0, 0, 0, 0], [0, 0]),
    )
    out = tmp_path / "counts.json"
    result = await run(server, "--out", str(out), "--redundant-experts", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "120 rows of 6 experts in 1 layers; the hottest expert has 4.0 times the mean of its layer",
        "busiest rank / mean rank:",
        "  instance 0 (mixed, ep2) was 1.67, placed by these counts 1.50, with 2 redundant experts"
        " 1.08",
        "  instance 1 (mixed, ep2) was 1.00, placed by these counts 1.50, with 2 redundant experts"
        " 1.08",
        f"{out}: for `nodeserve start --expert-counts {out}`",
    ]
    assert read_counts(out, MODEL) == ((0,) * 6, (0,) * 6, (80, 10, 10, 10, 10, 0))


async def test_who_did_not_answer_is_named(server: FakeServer) -> None:
    server.experts = answer(rank(0, [1, 1, 1, 1, 1, 1], [3, 3]), silent=(1, 4))
    result = await run(server)
    assert "warning: worker 1, 4 did not answer, its rows are missing" in result.stdout


async def test_without_rows_there_is_nothing_to_say(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    for told, words in (
        (answer(), "no ranks share experts here"),
        (answer(rank(0, [0] * 6, [0, 0])), "no rows were counted yet: send requests first"),
    ):
        server.experts = told
        result = await run(server, "--out", str(out))
        assert result.exit_code == 1 and words in result.stderr and not out.exists()
