"""The log of a whole node, as `nodeserve start` and its gateways write it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nodeserve import Client
from nodeserve.errors import NodeServeError
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.slow

SECRET = "Mergenthaler"
MESSAGES: list[Any] = [{"role": "user", "content": f"my name is {SECRET}"}]


class Server:
    """`nodeserve start` of simulated GPUs, the embedded tokenizer, and a gateway."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket, self.http = folder / "node.sock", folder / "http.sock"
        self.log = folder / "log"
        addresses = f"--socket={self.socket}", f"--http=unix:{self.http}"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "nodeserve", "start", "--device=sim", "--layout=1p1d"),
                    *("--profile=llama-3.1-8b-h100", "--restart-delay=0.1", *addresses, *options),
                ],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=PATIENCE_S) == 0


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        with Client(server.socket, connect_timeout_s=PATIENCE_S) as client:
            until_answered(server, client)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def until_answered(server: Server, client: Client) -> None:
    """Its socket is bound some time after it was started; then connections wait."""
    while True:
        assert server.process.poll() is None, server.lines()
        with contextlib.suppress(NodeServeError):
            client.server()
            return


def ask(server: Server) -> None:
    """Requests that are served, refused by the gateway, refused by the server, and left."""
    import httpx2

    transport = httpx2.HTTPTransport(uds=str(server.http))
    http = httpx2.Client(transport=transport, base_url="http://gateway", timeout=PATIENCE_S)
    with openai.OpenAI(base_url="http://gateway/v1", http_client=http, api_key="x") as client:
        chat = client.with_options(max_retries=5).chat.completions  # it may still start
        headers = {"x-request-id": "mine"}
        model = client.models.list().data[0].id
        chat.create(model=model, messages=MESSAGES, max_tokens=4, extra_headers=headers)
        bad: list[dict[str, Any]] = [
            {"temperature": SECRET},
            {"extra_body": {"top_k": SECRET}},
            {"stop": [SECRET] * 99},
            {"logit_bias": {SECRET: 1}},
            {"extra_body": {"min_tokens": 9999}},
        ]
        for options in bad:
            with pytest.raises(openai.BadRequestError):
                chat.create(model=model, messages=MESSAGES, max_tokens=4, **options)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=model, prompt=SECRET * 100_000)
        with pytest.raises(openai.NotFoundError):
            chat.create(model=SECRET, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            client.get(f"/{SECRET}", cast_to=str)
        stream = chat.create(model=model, messages=MESSAGES, stream=True)
        next(iter(stream))
        stream.close()


def events(server: Server) -> list[str]:
    return [str(one.get("event")) for one in server.objects()]


def test_a_node_tells_its_life_in_json(tmp_path: Path) -> None:
    """Every line of every process is an object; what matters has a line; no line has any text."""
    with served(tmp_path, "--log-format=json", "--log-level=debug") as server:
        ask(server)
        with Client(server.socket) as client:
            os.kill(client.stats()["workers"][1]["pid"], signal.SIGKILL)
            while client.stats()["workers"][1]["restarts"] < 1 or not all_ready(client):
                pass
        server.stop()
    assert SECRET not in server.log.read_text()
    found = events(server)
    in_order = ["start", "instance_lost", "instance_restarts", "instance_back"]
    places = [found.index(event) for event in [*in_order, "draining", "stopped"]]
    assert places == sorted(places)
    objects = server.objects()
    assert {one["process"] for one in objects} == {"server", "gateway"}
    phases = [one["phase"] for one in objects if one.get("event") == "start"]
    told = [phase for phase in phases if phase != "note"]
    assert told == ["model", "model", "workers", "pages", "ready"]
    visits = [one for one in objects if one.get("event") == "http_request"]
    assert {"mine"} <= {one["request_id"] for one in visits}
    assert {200, 400, 404} <= {one["status"] for one in visits}
    assert all(one["level"] == "debug" for one in visits)
    assert any("SIGKILL" in one["message"] for one in objects)


def all_ready(client: Client) -> bool:
    return all(worker["state"] == "ready" for worker in client.stats()["workers"])


def test_a_node_tells_its_life_in_text(tmp_path: Path) -> None:
    """By default nothing of single requests."""
    with served(tmp_path, "--log-level=info") as server:
        ask(server)
        server.stop()
    text = server.log.read_text()
    assert SECRET not in text
    assert "ready: " in text and "INFO draining; requests that have not ended: " in text
    assert "INFO stopped with exit code 0" in text
    assert "/v1/chat/completions" not in text and "connection from" not in text


@pytest.mark.parametrize("option", ["--log-level=loud", "--log-format=xml"])
@pytest.mark.parametrize("command", ["start", "gateway"])
def test_what_there_is_not_is_refused(command: str, option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nodeserve", command, option], capture_output=True, text=True
    )
    assert done.returncode == 1
    name, _, value = option.partition("=")
    assert done.stderr.startswith(f"Error: {name} {value}: use ")
