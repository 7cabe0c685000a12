"""The web page in a real Chromium, in front of a scripted server: how it looks, and what it says
when things are not as they should be. What it draws comes from tests/fakes/page_view.py."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from nodeserve.gateway.listen import Address
from nodeserve.gateway.settings import GatewaySettings
from tests.fakes.browser import VIEW, Watched, browser, needs_chromium, watched
from tests.fakes.gateway import gateway_on
from tests.fakes.page_view import busy_view, idle_view, troubled_view
from tests.fakes.server import FakeServer, endless, saying
from tests.unit.conftest import text_server

__all__ = ["browser"]  # a fixture
pytestmark = [pytest.mark.slow, needs_chromium, pytest.mark.asyncio(loop_scope="module")]
ANYWHERE = Address("127.0.0.1", 0)
CONTRAST = (Path(__file__).parents[1] / "fakes/contrast.js").read_text()
ENOUGH = 4.5  # WCAG AA
BACKGROUNDS = {"light": "rgb(243, 245, 248)", "dark": "rgb(15, 18, 22)"}
WATCH_SHIFTS = """
window.moved = [];
const name = (node) => node?.parentElement?.outerHTML.slice(0, 80);
const add = (list) => list.getEntries().forEach((one) =>
  window.moved.push(one.sources.map((source) => name(source.node))));
new PerformanceObserver(add).observe({type: 'layout-shift'});
"""
TURN = """(hidden) => {
  Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
  document.dispatchEvent(new Event('visibilitychange'));
}"""
FOCUS = "document.activeElement.id || document.activeElement.className"
UNNAMED = """[...document.querySelectorAll('input, textarea, button')].filter(
  (one) => !one.labels?.length && !one.textContent).length"""
KEY = "k€y-1"
fixture = pytest_asyncio.fixture(loop_scope="module")  # where the browser is


@fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with text_server(tmp_path) as server:
        yield server


@fixture
async def url(server: FakeServer) -> AsyncIterator[str]:
    async with gateway_on(ANYWHERE, GatewaySettings(socket=str(server.path))) as address:
        yield str(address)


@fixture
async def seen(browser: Browser, url: str) -> AsyncIterator[Watched]:
    """The page of a busy node, on a desk in daylight. It did nothing wrong in the end."""
    async with watched(browser, url) as seen:
        await seen.shows(busy_view())
        yield seen
        seen.check()


# ---- how it looks


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_and_can_be_read(browser: Browser, url: str, scheme: str, width: int) -> None:
    async with watched(browser, url, width=width, scheme=scheme) as seen:
        for view in (troubled_view(), idle_view(), busy_view()):
            await seen.shows(view)
            page = await seen.open()
            await expect(page.locator("#verdict-text")).to_have_text(view["verdict"])
            too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not await page.evaluate(too_wide)
            faint = [one for one in await page.evaluate(CONTRAST) if one[1] < ENOUGH]
            assert faint == []
        shown = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert shown == BACKGROUNDS[scheme]
        seen.check()


async def test_nothing_jumps_when_numbers_change(seen: Watched) -> None:
    page = await seen.open()
    await page.evaluate(WATCH_SHIFTS)
    view = busy_view()
    for worker in view["workers"]:
        worker.update(running=9, kv_use=1.0, step_ms=1234.0, tokens_per_s=123_456.0)
    view["admission"].update(queued=12_345, queued_tokens=98_765_432, parked=0)
    view["verdict"] = "nothing: 100 % of requests meet their objectives"
    await seen.shows(view)
    await expect(page.locator("#verdict-text")).to_have_text(view["verdict"])
    assert await page.evaluate("window.moved") == []


# ---- what it says


async def test_what_is_shown_of_a_busy_node(seen: Watched) -> None:
    page = await seen.open()
    await expect(page).to_have_title("qwen3-30b-a3b · nodeserve")
    full = page.locator(".worker", has_text="w5")
    await expect(full).to_contain_text("KVfull, 99 %running46waiting6step23.4 mstok/s1,871")
    roles = await page.locator(".pool").evaluate_all("all => all.map((one) => one.dataset.role)")
    assert roles == ["buffer", "prefill", "decode"]
    await expect(page.locator("#totals")).to_contain_text("finished154,310failed2")
    goodput = page.locator(".tile", has_text="Goodput")
    await expect(goodput).to_contain_text("16.1 req/s")
    await expect(page.locator("#attainment dl")).to_have_text("10 s93 %1 min91 %5 min95 %")
    await expect(page.locator("#blame li").first).to_contain_text("decode")
    rows = page.locator("#misses tbody tr")
    await expect(rows).to_have_count(5)
    await expect(rows.nth(1)).to_have_text("8 sbuffer▲ 1.13 s22.4 ms7,210212w1 → w5")
    await expect(page.locator("#ttft .limit")).to_have_count(1)


async def test_trouble_is_said(seen: Watched) -> None:
    await seen.shows(troubled_view())
    page = await seen.open()
    await expect(page.locator("#state-text")).to_have_text("Degraded")
    await expect(page.locator("#reasons")).to_contain_text("worker 6 restarts in 3 s")
    await expect(page.locator(".worker", has_text="w3")).to_contain_text("stands in for decode")
    await expect(page.locator(".worker", has_text="w2")).to_contain_text("2 restarts")
    lost = page.locator(".worker[data-up=no]")
    await expect(lost).to_contain_text("lost")
    await expect(lost).to_contain_text("killed by signal 9")


async def test_roles_that_change(seen: Watched) -> None:
    """Pools come and go in the order that a request meets them."""
    page = await seen.open()
    names = page.locator(".pool h3 > span:first-child")
    for roles, shown in (
        ("dddd", ["Decode"]),
        ("ppdd", ["Prefill", "Decode"]),
        ("mmmm", ["Mixed"]),
    ):
        view = busy_view()
        role_of = {"p": "prefill", "d": "decode", "m": "mixed"}
        view["workers"] = view["workers"][: len(roles)]
        for worker, letter in zip(view["workers"], roles, strict=True):
            worker.update(role=role_of[letter], acting=role_of[letter])
        await seen.shows(view)
        await expect(names).to_have_text(["Buffer", *shown])
        await expect(page.locator(".worker .name")).to_have_text(["w0", "w1", "w2", "w3"])


async def test_a_node_that_nobody_has_asked(seen: Watched) -> None:
    await seen.shows(idle_view())
    page = await seen.open()
    for panel, words in (
        ("#attainment", "No request with an objective"),
        ("#blame", "No request with an objective"),
        ("#tiles .tile >> nth=0", "none ended, no objectives"),
        ("#ttft", "Nothing to show yet"),
        ("#tpot", "Nothing to show yet"),
        ("#misses", "None so far"),
    ):
        await expect(page.locator(panel)).to_contain_text(words)


async def test_a_gateway_that_goes_away(browser: Browser, server: FakeServer) -> None:
    async with contextlib.AsyncExitStack() as running:
        settings = GatewaySettings(socket=str(server.path))
        address = await running.enter_async_context(gateway_on(ANYWHERE, settings))
        async with watched(browser, str(address)) as seen:
            await seen.shows(busy_view())
            page = await seen.open()
            await page.unroute_all()
            await running.aclose()
            await expect(page.locator("#state-text")).to_have_text("Gateway away")
            await expect(page.locator("#reasons")).to_contain_text("ago")
            await expect(page.locator(".worker")).to_have_count(8)


async def test_a_page_that_nobody_sees_asks_nothing(seen: Watched) -> None:
    await seen.page.clock.install()
    page = await seen.open()
    await turn(page, hidden=True)
    before = seen.num_views
    await page.clock.run_for(60_000)
    assert seen.num_views == before
    async with page.expect_response(VIEW):
        await turn(page, hidden=False)


async def turn(page: Page, *, hidden: bool) -> None:
    """As when another tab is in front."""
    await page.evaluate(TURN, hidden)


# ---- by keyboard


async def test_a_walk_by_keyboard(seen: Watched) -> None:
    page = await seen.open()
    walked = []
    for _ in range(5):
        await page.keyboard.press("Tab")
        walked.append(await page.evaluate(FOCUS))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await page.evaluate(outline) == "solid", f"where is the focus, at {walked[-1]}?"
    assert walked == ["skip", "prompt", "max-tokens", "send", "answer"]
    assert await page.evaluate(UNNAMED) == 0


async def test_the_first_stop_skips_to_the_prompt(seen: Watched) -> None:
    page = await seen.open()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator("#prompt")).to_be_focused()


# ---- the prompt box


@pytest.mark.parametrize("how", ["button", "key"])
async def test_stopping_cancels(seen: Watched, server: FakeServer, how: str) -> None:
    server.script = endless
    page = await seen.open()
    await page.fill("#prompt", "hello")
    await page.click("#send")
    await expect(page.locator("#answer")).to_have_text("a")
    await expect(page.locator("#stop")).to_be_focused()
    if how == "button":
        await page.click("#stop")
    else:
        await page.keyboard.press("Escape")
    (submit,) = server.submits
    await server.aborted[submit.request_id].wait()
    await expect(page.locator("#ask-state")).to_have_text("Stopped.")
    await expect(page.locator("#send")).to_be_focused()
    await expect(page.locator("#answer")).to_have_text("a")


async def test_what_a_model_says_is_text(seen: Watched, server: FakeServer) -> None:
    words = "<img src=x onerror=alert(1)><b>bold</b> &amp; é 🎉\nnext line"
    server.script = saying(words)
    page = await seen.open()
    await page.fill("#prompt", "hello")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#ask-state")).to_have_text("Done.")
    assert await page.inner_text("#answer") == words
    assert await page.locator("#answer *").count() == 0
    await expect(page.locator("#ask-tokens")).to_have_text(str(len(words.encode())))


async def test_a_server_that_goes_in_the_middle(seen: Watched, server: FakeServer) -> None:
    server.script = endless
    page = await seen.open()
    await page.fill("#prompt", "hello")
    await page.click("#send")
    await expect(page.locator("#answer")).to_have_text("a")
    for peer in server.peers:
        peer.close()
    await expect(page.locator("#ask-state")).to_contain_text("No answer: ")
    await expect(page.locator("#send")).to_be_enabled()


# ---- keys and policy


async def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, server: FakeServer) -> None:
    server.script = saying("hi")
    settings = GatewaySettings(socket=str(server.path), api_keys=(KEY,))
    async with gateway_on(ANYWHERE, settings) as address, watched(browser, str(address)) as seen:
        page = await seen.open()
        await expect(page.locator("#state-text")).to_have_text("API key needed")
        await expect(page.locator("#key")).to_be_focused()
        await expect(page.locator("#ask")).to_be_hidden()
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-words")).to_contain_text("does not count here")
        await seen.shows(busy_view())
        await page.fill("#key", KEY)
        await page.keyboard.press("Enter")
        await expect(page.locator("#state-text")).to_have_text("Live")
        await page.fill("#prompt", "hello")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#answer")).to_have_text("hi")
        stores = "[sessionStorage.length, localStorage.length, document.cookie]"
        kept: Any = await page.evaluate(stores)
        assert kept == [1, 0, ""]
        assert {fault for fault in seen.faults if "status of 401" not in fault} == set()


@pytest.mark.parametrize(
    "intrusion",
    [
        "const one = document.createElement('script'); one.textContent = 'window.hacked = 1';"
        " document.body.append(one)",
        "document.getElementById('answer').innerHTML = '<img src=x onerror=window.hacked=1>'",
        "document.getElementById('answer').innerHTML = '<b id=hacked>only bold</b>'",
        "document.getElementById('answer').setAttribute('onclick', 'window.hacked = 1')",
        "fetch('http://127.0.0.1:9/')",
    ],
)
async def test_the_policy_keeps_others_out(browser: Browser, url: str, intrusion: str) -> None:
    async with watched(browser, url) as seen:
        await seen.shows(busy_view())
        page = await seen.open()
        await page.evaluate(
            f"async () => {{ try {{ await (async () => {{ {intrusion} }})() }} catch {{}} }}"
        )
        await page.locator("#answer").click()
        assert not await page.evaluate("window.hacked")  # an element of that id is one, too
        words = ("Content Security Policy", "requires 'Trusted")
        assert any(word in fault for word in words for fault in seen.faults), seen.faults
