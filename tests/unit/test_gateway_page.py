"""The page's document and policy, and what the gateway asks of the server for those who look."""

import asyncio
import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nodeserve import AsyncClient
from nodeserve.errors import ConnectionLost
from nodeserve.gateway.engine import Engine
from nodeserve.gateway.page import load_page
from nodeserve.gateway.settings import GatewaySettings
from nodeserve.gateway.view import FRESH_S, View
from nodeserve.views import History, to_json
from nodeserve.wire.messages import GetStats
from tests.fakes.answers import answer
from tests.fakes.gateway import gateway_on, http_client
from tests.fakes.page_view import busy_view, idle_view, troubled_view
from tests.fakes.server import FakeServer

ROOT = Path(__file__).parents[2]
MAX_BYTES = 60_000


class Document(HTMLParser):
    """What of a document is looked at here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.ids: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        if self._tag in self.texts:
            self.texts[self._tag].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


@pytest.fixture(scope="module")
def document() -> Document:
    return Document(load_page().body.decode())


# ---- the document


def test_the_policy_names_what_is_inside_and_nothing_else(document: Document) -> None:
    policy = load_page().headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag, texts in document.texts.items():
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        assert hashes and rules[f"{tag}-src"].split() == hashes
    assert "unsafe" not in policy and rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"


def test_it_is_small_and_needs_nothing_else(document: Document) -> None:
    assert len(load_page().body) < MAX_BYTES
    for tag, name, value in document.attributes:
        assert not name.startswith("on") and name != "style", f"the policy refuses {tag} {name}"
        if name in ("src", "href"):
            assert value.startswith(("#", "data:")), value
    scripts = "".join(document.texts["script"])
    hosts = set(re.findall(r"https?://[^\"'/]+", scripts))
    assert hosts == {"http://www.w3.org"}, "the name of SVG, which nobody fetches"


def test_scripts_find_what_they_look_for(document: Document) -> None:
    assert len(set(document.ids)) == len(document.ids)
    wanted = set(re.findall(r'byId\("([\w-]+)"\)', "".join(document.texts["script"])))
    assert len(wanted) > 20 and wanted <= set(document.ids)
    pointed = {
        one
        for _, name, value in document.attributes
        if name in ("for", "aria-labelledby", "aria-describedby")
        for one in value.split()
    }
    assert pointed and pointed <= set(document.ids)


@pytest.mark.slow
def test_it_is_installed_with_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    ours, built = (folder / "nodeserve/gateway/web" for folder in (ROOT, tmp_path))
    assert (built / "page.html").exists()
    for path in ours.iterdir():
        assert (built / path.name).read_bytes() == path.read_bytes()


# ---- the gateway


@pytest.fixture
def asked(server: FakeServer) -> FakeServer:
    """A server that says how it is."""
    server.stats = answer()
    return server


@pytest.fixture
async def with_keys(asked: FakeServer, tmp_path: Path) -> AsyncIterator[Path]:
    settings = GatewaySettings(socket=str(asked.path), api_keys=("k",))
    async with gateway_on(tmp_path / "http", settings):
        yield tmp_path / "http"


async def test_the_page_is_open_and_what_it_shows_needs_a_key(with_keys: Path) -> None:
    async with http_client(with_keys) as client:
        page = await client.get("/")
        assert page.status_code == 200 and page.content == load_page().body
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for name, value in load_page().headers.items():
            assert page.headers[name] == value
        assert (await client.head("/")).status_code == 200
        assert (await client.get("/nodeserve/view")).status_code == 401
        view = await client.get("/nodeserve/view", headers={"authorization": "Bearer k"})
    assert view.status_code == 200 and view.headers["cache-control"] == "no-store"
    assert view.json() == json.loads(json.dumps(to_json(History().add(answer()))))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_one_question_a_second_however_many_look(asked: FakeServer) -> None:
    clock = Clock()
    async with AsyncClient(asked.path) as client:
        view = View(Engine(client), clock)
        bodies = await asyncio.gather(*(view.body() for _ in range(50)))
        assert len(set(bodies)) == 1 and asked.count(GetStats) == 1
        clock.now_s = 0.99 * FRESH_S
        assert await view.body() == bodies[0] and asked.count(GetStats) == 1
        asked.stats = answer(uptime_s=101.0)
        clock.now_s = FRESH_S
        assert await view.body() != bodies[0] and asked.count(GetStats) == 2
    assert asked.count(GetStats) == 2, "nobody looks, nobody asks"


async def test_one_who_leaves_takes_nothing_from_the_others(asked: FakeServer) -> None:
    async with AsyncClient(asked.path) as client:
        view = View(Engine(client))
        first, second = (asyncio.ensure_future(view.body()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert b'"layout":"1p1d"' in await second
        assert first.cancelled()


async def test_what_json_has_no_number_for(asked: FakeServer) -> None:
    asked.stats["goodput"]["misses"] = [{"slo": {"ttft_ms": math.inf, "tpot_ms": 5.0}}]
    async with AsyncClient(asked.path) as client:
        view = json.loads(await View(Engine(client)).body())
    assert view["misses"] == [{"slo": {"ttft_ms": None, "tpot_ms": 5.0}}]


async def test_a_server_that_is_not_there_and_comes(asked: FakeServer, tmp_path: Path) -> None:
    """What failed is not kept."""
    path = tmp_path / "later"
    async with AsyncClient(path) as client:
        view = View(Engine(client))
        with pytest.raises(ConnectionLost):
            await view.body()
        path.symlink_to(asked.path)
        assert b'"model":"m"' in await view.body()


# ---- what pictures of the page are made from


def shape_of(value: Any) -> Any:
    """Names, as deep as both of two views have something."""
    if isinstance(value, dict):
        return {name: shape_of(one) for name, one in value.items()}
    return [shape_of(value[0])] if isinstance(value, list | tuple) and value else None


def agree(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict) and isinstance(other, dict) and one and other:
        if path.rsplit("/", 1)[-1] in ("missed", "slo", "requests", "rates", "ring"):
            return  # maps of what there is
        assert one.keys() == other.keys(), path
        for name in one:
            agree(one[name], other[name], f"{path}/{name}")
    elif isinstance(one, list) and isinstance(other, list):
        agree(one[0], other[0], f"{path}[]")


@pytest.mark.parametrize("view", [busy_view(), troubled_view(), idle_view()])
def test_they_are_like_real_ones(view: dict[str, Any]) -> None:
    agree(shape_of(view), shape_of(to_json(History().add(answer()))))
