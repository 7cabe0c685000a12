"""A real Chromium without a window, and what a page that is watched in it did wrong."""

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, async_playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is here: Debian's package is called chromium"
)
VIEW = "**/nodeserve/view"
expect.set_options(timeout=30_000)  # on a busy machine too


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One for all tests of a module, which run in its event loop; each has a context of its own."""
    as_root = ["--no-sandbox"] if os.getuid() == 0 else []  # its sandbox needs another user
    async with async_playwright() as tools:
        browser = await tools.chromium.launch(executable_path=CHROMIUM, args=as_root)
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page in a context of its own. `faults`: what it said on its console or threw; `strays`:
    what it asked of others than its own gateway."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.faults: list[str] = []
        self.strays: list[str] = []
        self.view: dict[str, Any] | None = None
        self.num_views = 0
        host = urlsplit(url).netloc
        page.on("console", lambda message: self.faults.append(message.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if urlsplit(request.url).netloc == host or request.url.startswith("data:")
                else self.strays.append(request.url)
            ),
        )

    async def shows(self, view: dict[str, Any]) -> None:
        """From now on the gateway's state is this, whatever the server says."""
        if self.view is None:
            await self.page.route(VIEW, self._answer)
        self.view = view

    async def _answer(self, route: Route) -> None:
        self.num_views += 1
        await route.fulfill(json=self.view)

    async def open(self) -> Page:
        await self.page.goto(self.url)
        # Not wait_for_function(): it evaluates strings, which the page's policy refuses.
        await expect(self.page.locator("body")).not_to_have_attribute("data-state", "loading")
        return self.page

    def check(self) -> None:
        assert not self.faults and not self.strays


@contextlib.asynccontextmanager
async def watched(
    browser: Browser, url: str, *, width: int = 1280, scheme: str = "light"
) -> AsyncIterator[Watched]:
    context = await browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    try:
        yield Watched(await context.new_page(), url)
    finally:
        await context.close()
