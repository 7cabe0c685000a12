"""Requests that are given up in every phase of their lives, and what an audit finds after it."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from nodeserve.wire.messages import Abort
from tests.fakes.raw_client import RawClient
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, RunningNode

pytestmark = pytest.mark.slow

VICTIM, OTHER = 1, 2
NUM_REFUSED = 6000  # Ends of some 300 bytes each: more than all buffers of a connection take
SPLIT = ("buffered", "prefilling", "parked", "moving", "decoding", "unread")
MIXED = ("buffered", "prefilling", "decoding", "unread")


async def audited(watcher: RawClient) -> dict[str, Any]:
    """An audit, which must add up at any moment."""
    audit = await watcher.audit()
    assert audit["problems"] == []
    return audit


async def until(watcher: RawClient, phases: dict[str, int]) -> None:
    """Returns when the requests are in these phases; the test's timeout bounds it."""
    while (await audited(watcher))["requests"] != phases:
        pass


def status_audit(node: RunningNode) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "nodeserve", "status", "--audit", "--socket", str(node.socket)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


async def until_all_free(watcher: RawClient) -> None:
    """Returns when no block is held, not even by a step that still runs."""
    while any(worker["held_blocks"] for worker in (await audited(watcher))["workers"]):
        pass


async def bring_to(phase: str, victim: RawClient, watcher: RawClient) -> None:
    """Requests of the victim's, one of them in this phase."""
    long_prompt = [5] * 800  # a dozen passes
    if phase == "buffered":
        for number in (OTHER, VICTIM):
            victim.submit(number, long_prompt, max_tokens=5)
        await until(watcher, {"prefill": 1, "waiting": 1})
    elif phase == "prefilling":
        victim.submit(VICTIM, long_prompt, max_tokens=5)
        await until(watcher, {"prefill": 1})
    elif phase == "parked":
        for number in (OTHER, VICTIM):
            victim.submit(number, [5] * 20, max_tokens=900)
        await until(watcher, {"decode": 1, "parked": 1})
    elif phase == "moving":
        victim.submit(VICTIM, [5] * 60, max_tokens=5)
        await until(watcher, {"moving": 1})
    elif phase == "decoding":
        victim.submit(VICTIM, [5] * 20, max_tokens=900)
        await until(watcher, {"decode": 1})
    else:
        await leave_unread(victim, watcher)


async def leave_unread(victim: RawClient, watcher: RawClient) -> None:
    """The victim's request ends while the server holds back what it should have read before."""
    before = (await watcher.stats())["requests"]
    for number in range(100, 100 + NUM_REFUSED):
        victim.submit(number, [5], max_tokens=0)
    victim.submit(VICTIM, [5] * 20, max_tokens=5)
    await victim.writer.drain()
    while (await watcher.stats())["requests"]["finished"] == before["finished"]:
        await audited(watcher)


async def give_up(how: str, victim: RawClient, phase: str) -> None:
    if how == "disconnect":
        await victim.close()
        return
    for number in (VICTIM, OTHER):
        victim.send(Abort(number))
    await victim.finish(VICTIM)
    reason = "length" if phase == "unread" else "cancelled"
    assert [end.reason for end in victim.ends[VICTIM]] == [reason]


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
@pytest.mark.parametrize(("layout", "phases"), [("1p1d", SPLIT), ("1m", MIXED)])
async def test_a_request_given_up_in_any_phase_leaves_nothing(
    nodes: Nodes, connect: Connect, layout: str, phases: tuple[str, ...], how: str
) -> None:
    one_at_a_time = {"max_num_seqs": 1} if layout == "1p1d" else {}
    node = nodes.start(layout=layout, device="sim", profile="slow", **one_at_a_time)
    watcher = await connect(node)
    for phase in phases:
        victim = await connect(node, limit_bytes=1024)
        await bring_to(phase, victim, watcher)
        await give_up(how, victim, phase)
        await until(watcher, {})
        await until_all_free(watcher)


@pytest.mark.parametrize(
    ("leak", "words"),
    [
        ("block", "blocks, but 2"),
        ("request", "worker 1 (decode): still has request"),
        ("record", "records from it:"),
    ],
)
async def test_what_a_worker_leaks_is_found(
    nodes: Nodes, connect: Connect, leak: str, words: str
) -> None:
    """By the command as well, which says what and fails."""
    node = nodes.start(layout="1p1d", device="sim", leak=leak)
    client = await connect(node)
    client.submit(1, [5] * 20, max_tokens=900)
    await client.read_until(lambda: len(client.tokens.get(1, [])) > 1)  # so it is decoded
    client.send(Abort(1))
    await client.finish(1)
    while not (problems := (await client.audit())["problems"]):
        pass
    assert any(words in problem for problem in problems), problems
    told = await asyncio.to_thread(status_audit, node)
    assert told.returncode == 1
    assert told.stdout.startswith("does not add up\n  ") and words in told.stdout
    node.is_ready = False  # the audit after every test would find it too


async def test_the_command_says_when_everything_adds_up(nodes: Nodes) -> None:
    node = nodes.start(layout="1p1d", device="sim")
    told = await asyncio.to_thread(status_audit, node)
    assert told.returncode == 0
    verdict, *workers = told.stdout.splitlines()
    assert verdict == "adds up  requests: none"
    assert workers[0].startswith("worker 0 (prefill)  256 blocks: 256 free, 0 held  requests: none")
