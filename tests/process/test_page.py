"""The web page in a real Chromium, in front of a real node of simulated GPUs."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from tests.fakes.browser import browser, needs_chromium, watched
from tests.fakes.gguf_writer import CHAT_TEMPLATE, gpt2_metadata, write_gguf
from tests.process.conftest import Nodes, RunningNode, StartGateways

__all__ = ["browser"]  # a fixture
pytestmark = [pytest.mark.slow, needs_chromium, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One that can chat."""
    return write_gguf(
        tmp_path / "model.gguf", gpt2_metadata(**{"tokenizer.chat_template": CHAT_TEMPLATE})
    )


@pytest.fixture
def text_node(nodes: Nodes, tokenizer: Path) -> RunningNode:
    return nodes.start(layout="2p1d", device="sim", tokenizer=str(tokenizer))


async def test_workers_are_shown_and_their_numbers_move(
    browser: Browser, start_gateways: StartGateways
) -> None:
    gateways = start_gateways()
    async with watched(browser, gateways.url) as seen, gateways.client() as client:
        page = await seen.open()
        await expect(page.locator("#state-text")).to_have_text("Live")
        assert await page.locator(".pool h3 > span:first-child").all_inner_texts() == [
            *("Buffer", "Prefill", "Decode")
        ]
        assert await page.locator(".worker .name").all_inner_texts() == ["w0", "w1", "w2"]
        decode = page.locator(".pool[data-role=decode] .worker")
        running = decode.locator("dl div", has_text="running").locator("dd")
        await expect(running).to_have_text("0")

        async def load() -> None:
            while True:
                streams = [
                    client.completions.create(
                        model="fake", prompt=[number, 5, 6], max_tokens=200, seed=number
                    )
                    for number in range(12)
                ]
                await asyncio.gather(*streams)

        loading = asyncio.ensure_future(load())
        await expect(running).not_to_have_text("0")
        await expect(page.locator("#ttft figure")).to_be_visible(timeout=20_000)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        seen.check()


async def test_the_prompt_box_streams_an_answer(
    browser: Browser, start_gateways: StartGateways
) -> None:
    async with watched(browser, start_gateways().url) as seen:
        page = await seen.open()
        await page.fill("#prompt", "hello")
        await page.fill("#max-tokens", "40")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#ask-state")).to_have_text(
            "Ended at the most tokens that were asked for."
        )
        await expect(page.locator("#ask-tokens")).to_have_text("40")
        await expect(page.locator("#ask-ttft")).to_contain_text("ms")
        assert float(await page.inner_text("#ask-rate")) > 0
        assert await page.inner_text("#answer")
        seen.check()


async def test_a_worker_that_dies_and_comes_back(
    browser: Browser, start_gateways: StartGateways, text_node: RunningNode
) -> None:
    async with watched(browser, start_gateways().url) as seen:
        page = await seen.open()
        os.kill(text_node.worker_pids()[1], signal.SIGKILL)
        await expect(page.locator(".worker", has_text="1 restart")).to_have_count(1)
        await expect(page.locator("#state-text")).to_have_text("Live")
        seen.check()


async def test_a_node_that_ends_and_one_that_comes(
    browser: Browser,
    start_gateways: StartGateways,
    nodes: Nodes,
    text_node: RunningNode,
    tokenizer: Path,
) -> None:
    async with watched(browser, start_gateways().url) as seen:
        page = await seen.open()
        text_node.process.terminate()
        await expect(page.locator("body")).to_have_attribute("data-state", "down")
        await expect(page.locator("#state-text")).to_have_text("Node down")
        await expect(page.locator("#reasons")).to_contain_text("ago")
        text_node.wait()
        nodes.start(layout="1m", device="sim", tokenizer=str(tokenizer), socket=text_node.socket)
        await expect(page.locator("#state-text")).to_have_text("Live")
        assert await page.locator(".pool h3 > span:first-child").all_inner_texts() == [
            *("Buffer", "Mixed")
        ]
        assert {fault for fault in seen.faults if "status of 503" not in fault} == set()


async def test_two_gateway_processes_and_two_browsers(
    browser: Browser, start_gateways: StartGateways
) -> None:
    url = start_gateways("--workers", "2").url
    async with watched(browser, url) as one, watched(browser, url, scheme="dark") as other:
        pages = [await seen.open() for seen in (one, other)]
        for page in pages:
            await expect(page.locator(".worker")).to_have_count(3)
        one.check()
        other.check()
