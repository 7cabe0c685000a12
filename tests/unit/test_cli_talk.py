"""The commands that talk to a server, against a scripted one."""

import asyncio
import json
import os
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nodeserve.cli import main
from nodeserve.wire.messages import Stop, Submit, unpack_ids
from tests.fakes.answers import answer, span, worker
from tests.fakes.server import FakeServer, Peer, saying

WORKER = {
    **worker(0, "prefill"),
    **{"index": 0, "role": "prefill", "pid": 77, "state": "ready", "running": 1, "waiting": 2},
    **{"pinned": 3, "free_blocks": 40, "num_blocks": 50, "waiting_tokens": 6, "steps": 7},
    **{"step_ms": 8.5, "tokens": 9, "tokens_per_s": 1.0, "handoffs": 10, "handoff_bytes": 11},
    **{"threads": 1, "kernels": "native"},
}
STATS: dict[str, Any] = {
    **answer(spans=[span(10, 50, handoff_wait=31, buffer=19), span(60), span(300)]),
    **{"model": "fake", "layout": "1p1d", "pid": 76, "uptime_s": 3725.5},
    "requests": {"queued": 1, "running": 2, "parked": 0},
    "rates": {"prompt_tokens_per_s": 1.25, "output_tokens_per_s": 2.5, "requests_per_s": 0.125},
    "dispatch": {
        **answer()["dispatch"],
        **{"admission": "staggered", "decode_allocation": "cost", "falling_back": False},
        **{"window_ms": 12.25, "pass_ms": None, "queued_tokens": 9, "queue": []},
        "instances": [{"instance": 0, "state": "idle"}],
    },
    "workers": [WORKER, {**WORKER, "index": 1, "role": "decode"}],
}


async def run(server: FakeServer, *arguments: str, stdin: str = "") -> Result:
    command = [*arguments, "--socket", str(server.path)]
    return await asyncio.to_thread(CliRunner().invoke, main, command, input=stdin)


def prompts(server: FakeServer) -> list[str]:
    return [bytes(list(unpack_ids(submit.token_ids))).decode() for submit in server.submits]


# ---- complete


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
async def test_complete_prints_the_text(server: FakeServer, stream: str) -> None:
    server.script = saying("Paris, né")
    result = await run(server, "complete", "France?", stream, "--max-tokens", "9", "--seed", "3")
    assert (result.exit_code, result.stdout) == (0, "Paris, né\n")
    assert prompts(server) == ["France?"]
    assert server.submits[0].sampling == {"max_tokens": 9, "seed": 3}


async def test_complete_as_json_has_all_there_is(server: FakeServer) -> None:
    server.script = saying("Paris. More")
    result = await run(server, "complete", "x", "--json", "--stop", "!", "--stop", ".")
    done = json.loads(result.stdout)
    assert (done["text"], done["finish_reason"]) == ("Paris", "stop")
    assert done["usage"]["prompt_tokens"] == 1
    assert done["timings"]["decode_worker"] == 1


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
async def test_complete_says_where_the_time_went(server: FakeServer, stream: str) -> None:
    result = await run(server, "complete", "x", stream, "--timings")
    first, then = result.stderr.splitlines()
    assert first == (
        "first token 750.0 ms = 250.0 in the queue + 0.0 to the worker + 0.0 waiting there"
        " + 500.0 prefill + 0.0 back"
    )
    assert then.startswith("then 0.0 ms") and "workers 0 and 1" in then


async def test_complete_reads_stdin(server: FakeServer) -> None:
    await run(server, "complete", "-", stdin="a\nb")
    assert prompts(server) == ["a\nb"]


async def test_a_setting_out_of_range_is_one_line(server: FakeServer) -> None:
    result = await run(server, "complete", "x", "--temperature", "-1")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: temperature must be")


# ---- chat


async def test_a_chat_remembers_until_it_is_reset(server: FakeServer) -> None:
    server.script = saying("A")
    lines = "one\n\n  two  \n/nonsense\n/reset\nthree\n/exit\nnever\n"
    result = await run(server, "chat", "--system", "S", stdin=lines)
    assert (result.exit_code, result.stdout) == (0, "A\nA\nA\n")
    assert "unknown command /nonsense" in result.stderr
    assert prompts(server) == [
        "[system]S[user]one[assistant]",
        "[system]S[user]one[assistant]A[user]two[assistant]",
        "[system]S[user]three[assistant]",
    ]


async def test_a_turn_that_fails_is_forgotten(server: FakeServer) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        if len(server.submits) == 1:
            peer.end(submit, "error", 0, "prompt_too_long", "too long")
        else:
            await saying("A")(peer, submit)

    server.script = script
    result = await run(server, "chat", stdin="one\ntwo\n")
    assert (result.exit_code, result.stdout.strip()) == (0, "A")
    assert "Error: too long" in result.stderr
    assert prompts(server)[1] == "[user]two[assistant]"


async def test_a_chat_ends_when_the_server_does(server: FakeServer) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.close()

    server.script = script
    result = await run(server, "chat", stdin="one\ntwo\n")
    assert result.exit_code == 1
    assert "connection to the server ended" in result.stderr
    assert len(server.submits) == 1


# ---- status and stop


async def test_status_shows_node_and_workers(server: FakeServer) -> None:
    server.stats = STATS
    result = await run(server, "status")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"fake  1p1d  pid 76  up 1:02:05  {server.path}"
    assert lines[1] == "requests  1 queued  2 running  0 parked"
    assert lines[2].endswith("1.2 prompt tokens/s  2.5 output tokens/s  0.12 requests/s")
    assert lines[3] == "goodput   no decode worker takes more (0 parked): 62% of misses in 10 s"
    assert lines[4] == "dispatch  staggered  every 12.2 ms  decode by cost"
    rows = [line.split() for line in lines if line.split()[1:2] in (["prefill"], ["decode"])]
    assert [row[:9] for row in rows] == [
        ["0", "prefill", "ready", "77", "1", "2", "3", "40/50", "7"],
        ["1", "decode", "ready", "77", "1", "2", "3", "40/50", "7"],
    ]


async def test_status_tells_who_waits_and_who_is_in_doubt(server: FakeServer) -> None:
    queue = [
        {"priority": 5, "best_effort": False, "requests": 3},
        {"priority": 0, "best_effort": True, "requests": 4},
    ]
    doubt = {"queue": queue, "falling_back": True, "pass_ms": 45.625}
    instances = [{"instance": 2, "state": "suspect"}, {"instance": 3, "state": "busy"}]
    dispatch = {**STATS["dispatch"], **doubt, "instances": instances}
    server.stats = {**STATS, "dispatch": dispatch}
    lines = (await run(server, "status")).stdout.splitlines()
    assert lines[4:6] == [
        "dispatch  shortest-queue, for the window cannot be trusted now  a pass takes 45.6 ms"
        "  suspect: instance 2  decode by cost",
        "queue     3 of priority 5  4 of priority 0 best effort",
    ]


async def test_status_names_gpus_kernels_and_handoffs_where_there_are_any(
    server: FakeServer,
) -> None:
    graphs = {"kernels": "triton attention", "handoff": "CUDA IPC", "free_blocks": 54321}
    workers: list[dict[str, Any]] = [
        {**WORKER, **graphs, "gpu": 0, "num_blocks": 54321, "pid": 1234567},
        {**WORKER, **graphs, "gpu": 1, "index": 1, "role": "decode", "kernels": "reference"},
    ]
    server.stats = {**STATS, "workers": workers}
    lines = (await run(server, "status")).stdout.splitlines()
    assert lines[5:8] == [
        "kernels   triton attention (worker 0)",
        "kernels   reference (worker 1)",
        "handoff   CUDA IPC",
    ]
    assert [line.split()[:3] for line in lines if "ready" in line] == [
        ["0", "prefill", "0"],
        ["1", "decode", "1"],
    ]
    assert all(len(line.rstrip()) <= 80 for line in lines[3:]), "folded on a small terminal"


async def test_status_tells_who_is_away_and_who_stands_in(server: FakeServer) -> None:
    fine = {"acting": "prefill", "restarts": 0, "restart_in_s": None, "reason": ""}
    away = {"restarts": 2, "reason": "decode worker 1 was killed by SIGKILL"}
    first, second = {**WORKER, **fine}, {**STATS["workers"][1], **away, "acting": "decode"}
    server.stats = {**STATS, "workers": [first, {**second, "restart_in_s": None}]}
    words = (await run(server, "status")).stdout
    told = "restarts: 2  last end: decode worker 1 was killed by SIGKILL"
    assert f"worker 1  {told}" in words.splitlines() and "worker 0" not in words

    lost = {**second, "state": "restarting", "restart_in_s": 1.25}
    stands_in = {**first, "acting": "mixed"}
    gone = {**second, "index": 12, "state": "taken out", "restart_in_s": None}
    server.stats = {**STATS, "workers": [stands_in, lost, gone]}
    lines = (await run(server, "status")).stdout.splitlines()
    assert [line for line in lines if line.startswith("worker ")] == [
        "worker 0  takes prompts and decodes, since nobody else does one of them",
        f"worker 1  restarting in 1.2 s  {told}",
        f"worker 12 taken out  {told}",
    ]


async def test_status_of_mixed_workers_without_gpus_says_neither(server: FakeServer) -> None:
    worker = {**WORKER, "role": "mixed", "gpu": None, "handoff": "shared memory"}
    server.stats = {**STATS, "layout": "1m", "workers": [worker]}
    words = (await run(server, "status")).stdout
    assert "gpu" not in words and "handoff " not in words
    assert "kernels   native" in words.splitlines()


async def test_status_as_json(server: FakeServer) -> None:
    server.stats = STATS
    result = await run(server, "status", "--json")
    assert json.loads(result.stdout) == {**STATS, "socket": str(server.path)}


@pytest.mark.parametrize("drain", [False, True])
async def test_stop_waits_for_the_end(server: FakeServer, drain: bool) -> None:
    result = await run(server, "stop", *(["--drain"] if drain else []))
    assert (result.exit_code, result.stdout) == (0, "stopped (pid 4000000)\n")
    assert Stop(drain) in server.received


async def test_stop_says_when_the_server_does_not_end(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeserve.cli.show.END_TIMEOUT_S", 0.01)
    server.about["pid"] = os.getpid()
    result = await run(server, "stop")
    assert result.exit_code == 1
    assert f"still runs after 0.01 s: try `kill -KILL {os.getpid()}`" in result.stderr


async def test_a_drain_is_cut_short_when_its_time_is_over(server: FakeServer) -> None:
    server.drains_for_ever = True
    result = await run(server, "stop", "--drain", "--timeout", "0.01")
    assert (result.exit_code, result.stdout) == (
        3,
        "stopped (pid 4000000); requests still ran after 0.01 s\n",
    )
    assert server.received == [Stop(True), Stop(False)]


async def test_stop_says_when_the_socket_is_left(server: FakeServer) -> None:
    server.leaves_socket = True
    result = await run(server, "stop")
    assert result.exit_code == 1
    assert f"left {server.path}" in result.stderr
