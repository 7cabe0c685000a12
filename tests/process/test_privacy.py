"""What people write stays between them and the model: in no log, in no memory of others."""

import logging
import os
import re
import signal
import stat
from array import array
from pathlib import Path
from typing import Any

import pytest

from nodeserve.coordinator.request import Request, Stamps
from nodeserve.policy.batching import Sequence
from nodeserve.policy.units import Waiting
from nodeserve.types import Sampling
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import Submit, pack_ids
from tests.fakes.model import expected_stream
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, RunningNode

pytestmark = pytest.mark.slow

PROMPT = [61, 62, 63, 64, 65, 66, 67, 68]
OUTPUT = expected_stream(PROMPT, 40)
TEXT = "a-word-of-mine"


def patterns() -> dict[str, re.Pattern[str]]:
    """How four tokens in a row might be written, and text."""
    found = {"text": re.compile(TEXT)}
    for name, tokens in {"prompt": PROMPT[2:6], "output": OUTPUT[2:6]}.items():
        found[f"{name}, numbers"] = re.compile(r"\D+".join(rf"\b{token}\b" for token in tokens))
        found[f"{name}, bytes"] = re.compile(re.escape(repr(pack_ids(tokens))[2:-1]))
        found[f"{name}, hex"] = re.compile(pack_ids(tokens).hex(), re.IGNORECASE)
    return found


def told(log: str) -> list[str]:
    return [name for name, pattern in patterns().items() if pattern.search(log)]


def test_the_patterns_find_what_they_look_for() -> None:
    packed = pack_ids(PROMPT)
    for shown in (PROMPT, packed, packed.hex(), array("i", PROMPT)):
        assert [name.split(",")[0] for name in told(str(shown))] == ["prompt"]
    assert told(f"{OUTPUT}") == ["output, numbers"] and told(f"xx{TEXT}") == ["text"]
    assert told("step 61 took 62 ms; 63 left") == []


@pytest.mark.parametrize("level", ["NOTSET", "DEBUG", "INFO", "WARNING"])
async def test_no_level_of_the_log_has_prompts_or_outputs(
    nodes: Nodes, connect: Connect, level: str
) -> None:
    """Of requests that are served, refused, and cut off by what else their client sends."""
    node = nodes.start(layout="1p1d", log_level=logging.getLevelName(level))
    client = await connect(node)
    client.submit(1, PROMPT, max_tokens=40, logprobs=2)
    await client.finish(1)
    assert client.tokens[1] == OUTPUT
    refused: list[dict[str, Any]] = [{TEXT: 1}, {"max_tokens": TEXT}, {"stop_token_ids": [TEXT]}]
    for request_id, values in enumerate(refused, 2):
        client.submit(request_id, PROMPT, **values)
    client.send(Submit(9, pack_ids(PROMPT), {}, {TEXT: 1}, 0))
    client.send(Submit(10, pack_ids([*PROMPT, 10_000]), {}, None, 0))
    await client.finish(2, 3, 4, 9, 10)
    assert {end.code for ends in list(client.ends.values())[1:] for end in ends} == {
        "invalid_request"
    }
    for garbage in (frame(TEXT.encode()), frame(b"\x92\x01" + pack_ids(PROMPT)), TEXT.encode()):
        broken = await connect(node)
        broken.submit(1, PROMPT, max_tokens=300)
        broken.writer.write(garbage)
        await broken.read_to_end()
    log = await stop_and_check(node)
    assert level in ("INFO", "WARNING") or "connection from pid" in log
    assert level == "WARNING" or re.search(r"refused \d requests?: \d invalid_request", log)


@pytest.mark.parametrize("fault", [{"crash_at_step": 3}, {"fail_at_step": 3}])
async def test_a_worker_that_fails_over_a_request_does_not_tell_of_it(
    nodes: Nodes, connect: Connect, fault: dict[str, int]
) -> None:
    node = nodes.start(layout="1m", log_level=logging.DEBUG, fake=fault, restart_delay=0.0)
    client = await connect(node)
    client.submit(1, PROMPT, max_tokens=40)
    await client.finish(1)  # after some lives of the worker
    (end,) = client.ends[1]
    assert end.code == "worker_lost" and told(end.message) == []
    await stop_and_check(node)


async def stop_and_check(node: RunningNode) -> str:
    if node.process.poll() is None:
        node.process.send_signal(signal.SIGTERM)
    output, log = node.process.communicate(timeout=PATIENCE_S)
    assert told(output + log) == []
    return log


def test_what_holds_tokens_does_not_show_them() -> None:
    tokens: Any = array("i", PROMPT)
    waiting = Waiting(1, 8, 1, 0.0, 0)
    values: Any = {"stream": None, "sampling": {}, "slo": None}
    request = Request(
        request_id=1,
        client_id=1,
        tokens=tokens,
        num_prompt_tokens=8,
        max_tokens=4,
        waiting=waiting,
        stamps=Stamps(0.0),
        num_sent=8,
        wants_logprobs=False,
        **values,
    )
    for holder in (request, Sequence(1, tokens, 8, Sampling())):
        assert told(repr(holder)) == []


def open_memory(pid: int) -> dict[str, int]:
    """The shared memory and sockets' files that a process has open, with their modes."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target, status = os.readlink(path), path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode) and target.startswith(("/dev/shm/", "/memfd:")):
            found[target] = stat.S_IMODE(status.st_mode)
    return found


@pytest.mark.parametrize(
    "settings", [{"layout": "1p1d"}, {"layout": "1p:ep2,1d", "device": "sim"}], ids=["real", "sim"]
)
async def test_all_shared_memory_is_of_this_user_alone(
    nodes: Nodes, connect: Connect, settings: dict[str, str]
) -> None:
    """Rings, page pools, the board of ranks in lockstep: by every process that maps them."""
    node = nodes.start(**settings)
    client = await connect(node)
    client.submit(1, [1, 2, 3], max_tokens=4)
    await client.finish(1)
    modes = [open_memory(pid) for pid in (node.pid, *node.worker_pids())]
    assert all(len(found) >= 3 for found in modes)  # two rings and a pool
    assert {mode for found in modes for mode in found.values()} == {0o600}
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o600
