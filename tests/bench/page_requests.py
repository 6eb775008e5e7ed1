"""What an open live page asks of its server: seen in a real Chromium once, then asked again without it.

Owns: noting the page's requests and making them again. A browser's own work is its user's machine's, not the server's:
beside it on two cores it would be measured as the page's cost. Knows nothing of what the answers say.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from playwright.async_api import Request, async_playwright

# The page asks for everything at least so often.
_CYCLE_SECONDS = 8.0
_STREAM = "stream=true"


@dataclass(frozen=True)
class PageRequests:
    """`asked`: when, in seconds since the cycle began, and for what; `streams`: what stays open."""

    asked: tuple[tuple[float, str], ...]
    streams: tuple[str, ...]

    @property
    def per_second(self) -> float:
        return len(self.asked) / _CYCLE_SECONDS

    async def repeat(self, client: httpx.AsyncClient) -> None:
        """For ever, as often as the page."""
        await asyncio.gather(self._ask(client), *(_follow(client, path) for path in self.streams))

    async def _ask(self, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        while True:
            for at, path in self.asked:
                await asyncio.sleep(max(began + at - time.monotonic(), 0.0))
                (await client.get(path)).raise_for_status()
            began += _CYCLE_SECONDS


async def _follow(client: httpx.AsyncClient, path: str) -> None:
    while True:
        async with client.stream("GET", path) as response:
            response.raise_for_status()
            async for _ in response.aiter_bytes():
                pass


async def page_requests(url: str) -> PageRequests:
    """Of the page as it is after its start. Raises RuntimeError without Chromium, or if the page asks for nothing."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("Debian's chromium is not installed")
    asked: list[tuple[float, str]] = []

    def note(request: Request) -> None:
        parts = urlsplit(request.url)
        asked.append((time.monotonic(), f"{parts.path}?{parts.query}" if parts.query else parts.path))

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page()
        page.on("request", note)
        await page.goto(f"{url}/ui")
        await page.wait_for_timeout(4_000)
        streams = tuple(path for _, path in asked if _STREAM in path)
        asked.clear()
        began = time.monotonic()
        await page.wait_for_timeout(_CYCLE_SECONDS * 1000)
        await browser.close()
    within = tuple((at - began, path) for at, path in asked if at - began < _CYCLE_SECONDS and _STREAM not in path)
    if not within or not streams:
        raise RuntimeError(f"the page asked for nothing in {_CYCLE_SECONDS:g} s")
    return PageRequests(within, streams)
