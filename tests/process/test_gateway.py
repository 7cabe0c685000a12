"""Gateway processes beside a node of simulated GPUs: many streams, clients that leave, restarts."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest

from nodeserve.text import Tokenizer
from tests.fakes.gateway_process import COMMAND
from tests.fakes.node_process import TEXT_VOCAB
from tests.fakes.sim_worker import expected_stream
from tests.patience import PATIENCE_S
from tests.process.conftest import Connect, Nodes, RunningNode, StartGateways
from tests.process.test_node import settled


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def until_gone(pids: list[int]) -> None:
    """Bounded by the test's timeout."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            select.select([descriptor], [], [])
            os.close(descriptor)


async def text_of(client: openai.AsyncOpenAI, prompt: list[int], num_tokens: int) -> str:
    stream = await client.completions.create(
        model="fake",
        prompt=prompt,
        max_tokens=num_tokens,
        stream=True,
        temperature=0.0,  # else a seed of its own leads to other tokens
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    return "".join([event.choices[0].text async for event in stream])


@pytest.mark.slow
async def test_two_hundred_streams_at_once(
    start_gateways: StartGateways, text_node: RunningNode, tokenizer: Path, connect: Connect
) -> None:
    decode = Tokenizer.load(tokenizer).decode
    prompts = [[1 + number % 250, 2 + number % 7] for number in range(200)]
    async with start_gateways().client() as client:
        texts = await asyncio.gather(*(text_of(client, prompt, 8) for prompt in prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = expected_stream(prompt, 8, vocab_size=TEXT_VOCAB)
        assert text == decode(ids, skip_special=False, continues=True)
    stats = await settled(await connect(text_node))
    assert stats["requests"]["finished"] == 200


async def test_a_client_that_hangs_up_leaves_no_block(
    start_gateways: StartGateways, text_node: RunningNode, connect: Connect
) -> None:
    watcher = await connect(text_node)
    url = start_gateways().url
    for stream in (True, False):
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
            body = {"prompt": [5, 6, 7], "max_tokens": 1000, "stream": stream, "ignore_eos": True}
            asking = asyncio.ensure_future(client.post(f"{url}/v1/completions", json=body))
            while not (await watcher.stats())["requests"]["running"]:
                assert not asking.done()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        stats = await settled(watcher)
    assert stats["requests"]["cancelled"] == 2
    assert stats["requests"]["finished"] == 0


def test_the_blocking_sdk(start_gateways: StartGateways) -> None:
    with openai.OpenAI(base_url=f"{start_gateways().url}/v1", api_key="none") as client:
        done = client.completions.create(model="fake", prompt="hello", max_tokens=4)
        assert done.usage is not None and done.usage.completion_tokens == 4
        stream = client.completions.create(model="fake", prompt="hello", max_tokens=4, stream=True)
        assert [event.choices[0].finish_reason for event in stream][-1] == "length"


@pytest.mark.slow
async def test_one_that_is_killed_is_started_again(start_gateways: StartGateways) -> None:
    gateways = start_gateways("--workers", "2")
    async with gateways.client() as client:
        await client.models.list()
        before = gateways.pids()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        gateways.until_log(f"(pid {before[0]}) was ended by signal 9 and starts again")
        until_gone(before[:1])
    for _ in range(8):  # new connections, of which some go to the new one
        async with gateways.client() as client:
            await client.models.list()
    after = gateways.pids()
    assert len(after) == 2 and before[1] in after and before[0] not in after
    gateways.process.send_signal(signal.SIGTERM)
    assert gateways.process.wait(PATIENCE_S) == 0
    assert gone(after)


@pytest.mark.slow
async def test_gateways_end_with_whoever_keeps_them(start_gateways: StartGateways) -> None:
    gateways = start_gateways()
    async with gateways.client() as client:
        await client.models.list()
    pids = gateways.pids()
    gateways.process.kill()
    until_gone(pids)


async def test_answers_end_before_their_gateway_does(
    start_gateways: StartGateways, tokenizer: Path
) -> None:
    gateways = start_gateways()
    async with gateways.client() as client:
        stream = await client.completions.create(
            model="fake", prompt=[5], max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        events = aiter(stream)
        await anext(events)
        gateways.process.send_signal(signal.SIGTERM)
        rest = [event.choices[0].finish_reason async for event in events]
    assert rest[-1] == "length"
    assert gateways.process.wait(PATIENCE_S) == 0


@pytest.mark.slow
async def test_a_server_that_stops_and_comes_back(
    start_gateways: StartGateways, nodes: Nodes, text_node: RunningNode, tokenizer: Path
) -> None:
    url = start_gateways().url
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        assert (await client.get(f"{url}/ready")).status_code == 200
        text_node.process.terminate()
        await asyncio.to_thread(text_node.process.wait)
        down = await client.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert down.status_code == 503 and "nodeserve start" in down.json()["error"]["message"]
        nodes.start(layout="1m", device="sim", tokenizer=str(tokenizer), socket=text_node.socket)
        up = await client.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert up.status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--http", "127.0.0.1:port"], "use HOST:PORT"),
        (["--http", "256.0.0.1:80"], "cannot listen"),
        (["--api-key-file", "/no/such/file"], "--api-key-file /no/such/file"),
        (["--http", "unix:/no/such/folder/http.sock"], "cannot bind"),
    ],
)
def test_a_gateway_that_cannot_start_says_why(options: list[str], words: str) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--http", "nowhere"], "--http nowhere: use HOST:PORT"),
        (["--http-workers", "2"], "--http-workers is for gateways: give --http too"),
        (["--http", ":0", "--http-workers", "0"], "at least 1"),
    ],
)
def test_a_start_with_a_wrong_gateway_fails_before_it_loads(
    options: list[str], words: str, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "nodeserve",
        "start",
        "--socket",
        str(tmp_path / "x"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and words in done.stderr
    assert "looking for" not in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_an_address_that_is_taken_is_refused(start_gateways: StartGateways) -> None:
    taken = start_gateways().url.removeprefix("http://")
    done = subprocess.run(
        [*COMMAND, "--http", taken], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1 and f"cannot listen on http://{taken}" in done.stderr
