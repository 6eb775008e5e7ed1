"""What an operator sees, and when: a real server, a real Prometheus with our rules, and three things that go wrong.

    python -m tests.bench.alert_timeline [--faster 30] [--screenshots FOLDER]

A load of conversations runs. Then (1) the KV budget is filled, (2) the engine leaks memory on purpose, twice, and (3)
it is killed three times in a row. Told is when each metric moved, when its alert became pending, fired and was
resolved, and when each event happened that /v1/events tells of, in seconds since the fault. The rules are ours with all
their periods (`[10m]`, `for: 5m`) divided by `--faster`, since hours cannot be waited for; thresholds are as they are.
With `--screenshots` the live page is taken after each fault. Exit status 1 if an alert did not fire. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Browser, async_playwright

# Run as a module it finds the others of this folder as when it is run as a file.
sys.path.insert(0, str(Path(__file__).parent))

from chat_load import Conversation
from own_server import own_server

from tests.prometheus import Prometheus

LEAK_NBYTES_PER_SECOND = 24 * 10**6
CONFIG = {
    "kv": {"budget": "64MiB", "hibernate_quota": 0},
    "engine": {"max_private_growth": "64MB", "standby_engines": 1},
    "sessions": {"spawn_interval": "200ms"},
}
_SETTLE_SECONDS = 60.0
_DURATION = re.compile(r"(?<=\[)\d+[hms](?=\])|(?<=offset )\d+[hms]|(?<=for: )\d+[hms]")
_UNIT = {"s": 1, "m": 60, "h": 3600}


def faster(rules: str, factor: float) -> str:
    """The rules' text with all periods divided by `factor`, and none below 2 s, which is two scrapes."""

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[0][:-1]) * _UNIT[match[0][-1]]
        return f"{max(round(seconds / factor), 2)}s"

    return _DURATION.sub(shorter, rules)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong. `expression` is what is looked at, and moves once it is above `moves_at`."""

    name: str
    alert: str
    expression: str
    moves_at: float
    events: tuple[str, ...]
    happens: Callable[[], Awaitable[None]]
    # After it, until the alert is resolved; None: it is not waited for.
    ends: Callable[[], Awaitable[None]] | None = None


@dataclass
class Timeline:
    """What was seen of one fault; seconds since it began."""

    fault: str
    alert: str
    moments: list[tuple[float, str]] = field(default_factory=list)

    def add(self, at: float, what: str) -> None:
        self.moments.append((round(at, 1), what))

    @property
    def has_fired(self) -> bool:
        return any(what == f"{self.alert} fires" for _, what in self.moments)


class Watcher:
    """Looks at alerts, one metric, and events, several times a second."""

    def __init__(self, client: httpx.AsyncClient, prometheus: Prometheus):
        self._client = client
        self._prometheus = prometheus

    async def watch(self, fault: Fault, patience: float) -> Timeline:
        """Until the alert is resolved (where that is waited for), or patience is at its end."""
        timeline = Timeline(fault.name, fault.alert)
        state, has_moved, seen = "inactive", False, set[str]()
        last = (await self._events(None))["last"]
        began = time.monotonic()
        happening = asyncio.ensure_future(fault.happens())
        ending: asyncio.Future[None] | None = None
        while time.monotonic() - began < patience:
            value = await self._value(fault.expression)
            now_state = await self._state(fault.alert)
            page = await self._events(last)
            at, last = time.monotonic() - began, page["last"]
            if not has_moved and value > fault.moves_at:
                has_moved = True
                timeline.add(at, f"{fault.expression} = {value:.3g}")
            for event in page["data"]:
                # Its own time, not when we looked.
                if event["kind"] in fault.events:
                    told = event["text"] + (f" ({event['reason']})" if event["reason"] else "")
                    seen.add(event["kind"])
                    timeline.add(at - (time.time() - event["time"]), f"event: {told}")
            if now_state != state:
                words = {"inactive": "is resolved", "pending": "is pending", "firing": "fires"}
                timeline.add(at, f"{fault.alert} {words[now_state]}")
                state = now_state
            if happening.done():
                # What went wrong with it is not waited for.
                happening.result()
            if state == "firing" and happening.done() and ending is None:
                if fault.ends is None:
                    break
                ending = asyncio.ensure_future(fault.ends())
            if timeline.has_fired and state == "inactive":
                break
            await asyncio.sleep(0.2)
        await happening
        if ending is not None:
            await ending
        timeline.moments.sort()
        return timeline

    async def fires(self, alert: str) -> bool:
        return await self._state(alert) == "firing"

    async def _value(self, expression: str) -> float:
        found = await asyncio.to_thread(self._prometheus.query, expression)
        return max((value for _, value in found), default=0.0)

    async def _state(self, alert: str) -> str:
        alerts = (await asyncio.to_thread(self._prometheus.get, "/alerts"))["alerts"]
        states = {one["state"] for one in alerts if one["labels"]["alertname"] == alert}
        return "firing" if "firing" in states else "pending" if "pending" in states else "inactive"

    async def _events(self, after: int | None) -> Any:
        asked = {"limit": 100} | ({} if after is None else {"after": after})
        return (await self._client.get("/v1/events", params=asked)).raise_for_status().json()


class Trouble:
    """Makes the faults."""

    def __init__(self, client: httpx.AsyncClient, leak: Path):
        self._client = client
        self._leak = leak
        self._full: list[Conversation] = []

    async def fill(self) -> None:
        """Conversations that idle, until the KV budget is nearly leased."""
        while (await self._usage()) < 0.96 and len(self._full) < 80:
            conversation = Conversation(self._client)
            await conversation.say(4, "word " * 120)
            self._full.append(conversation)

    async def empty(self) -> None:
        for conversation in self._full:
            await conversation.delete()
        self._full.clear()

    async def leak_twice(self) -> None:
        """Each engine is left alone for its first minute: what it takes then is what it needs."""
        for _ in range(2):
            engine = await self._engine()
            await asyncio.sleep(max(_SETTLE_SECONDS + 3 - engine["age_seconds"], 0.0))
            engine = await self._engine()
            self._leak.write_text(f"{engine['pid']} {LEAK_NBYTES_PER_SECOND}")
            await self._replaced(engine["pid"])
            self._leak.unlink()

    async def kill_thrice(self) -> None:
        for _ in range(3):
            pid = (await self._engine())["pid"]
            os.kill(pid, signal.SIGKILL)
            await self._replaced(pid)

    async def _cluster(self) -> Any:
        return (await self._client.get("/v1/cluster")).raise_for_status().json()

    async def _usage(self) -> float:
        [node] = (await self._cluster())["nodes"]
        kv = node["kv_cache"]
        used = max(sum(kv["bytes_by_state"].values()), kv["leased_bytes"])
        return float(used / kv["budget_bytes"])

    async def _replaced(self, pid: int) -> None:
        while (await self._engine())["pid"] == pid:  # noqa: ASYNC110 -- it is another process
            await asyncio.sleep(0.1)

    async def _engine(self) -> Any:
        while True:
            for replica in (await self._cluster())["replicas"]:
                if replica["engine"] is not None:
                    return replica["engine"]
            await asyncio.sleep(0.1)


async def load(client: httpx.AsyncClient, failures: list[str]) -> None:
    """Two conversations at a time, for ever, each of a few turns."""

    async def talk() -> None:
        while True:
            conversation = Conversation(client)
            try:
                for _ in range(3):
                    await conversation.say(48)
                    await asyncio.sleep(0.5)
                await conversation.delete()
            except (RuntimeError, httpx.HTTPError) as error:
                failures.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(1.0)

    await asyncio.gather(talk(), talk())


@contextlib.asynccontextmanager
async def photographer(url: str, folder: Path | None) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Takes the live page, small; nothing without a folder."""
    if folder is None:

        async def nothing(name: str) -> None:
            pass

        yield nothing
        return
    async with async_playwright() as playwright:
        browser: Browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = await browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        await page.goto(f"{url}/ui")

        async def take(name: str) -> None:
            await page.wait_for_timeout(1_500)
            await page.screenshot(path=folder / f"{name}.png")

        yield take
        await browser.close()


async def run(url: str, prometheus: Prometheus, leak: Path, folder: Path | None) -> tuple[list[Timeline], list[str]]:
    failures: list[str] = []
    timelines = []
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client, photographer(url, folder) as take:
        trouble, watcher = Trouble(client, leak), Watcher(client, prometheus)
        loading = asyncio.ensure_future(load(client, failures))
        await asyncio.sleep(5.0)
        faults = (
            (
                Fault(
                    "the KV budget is filled",
                    "PhiKVNearBudget",
                    "max(phi_kv_cache_usage_perc)",
                    0.6,
                    ("memory_given_way", "turn_refused"),
                    trouble.fill,
                    trouble.empty,
                ),
                "kv-full",
            ),
            (
                Fault(
                    "the engine leaks, and so does the one after it",
                    "PhiEngineLeaks",
                    "max(phi_engine_private_bytes - phi_engine_private_baseline_bytes)",
                    10e6,
                    ("engine_recycled", "engine_took_over"),
                    trouble.leak_twice,
                ),
                "engine-leaks",
            ),
            (
                Fault(
                    "the engine is killed three times",
                    "PhiRecoveryBurst",
                    'sum(increase(phi_recoveries_total{component="engine"}[20s]))',
                    0.5,
                    ("engine_died", "engine_took_over", "engine_started"),
                    trouble.kill_thrice,
                    _nothing_more,
                ),
                "engine-killed",
            ),
        )
        for fault, name in faults:
            watching = asyncio.ensure_future(watcher.watch(fault, 200.0))
            # While it is there to be seen.
            while not watching.done() and not await watcher.fires(fault.alert):  # noqa: ASYNC110 -- so is Prometheus
                await asyncio.sleep(0.5)
            await take(name)
            timelines.append(await watching)
            print(told(timelines[-1]), flush=True)
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
    return timelines, failures


async def _nothing_more() -> None:
    pass


def told(timeline: Timeline) -> str:
    lines = [f"{timeline.fault}:"]
    lines += [f"  {at:7.1f} s  {what}" for at, what in timeline.moments]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faster", type=float, default=30.0, help="what the rules' periods are divided by")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the live page")
    parser.add_argument("--port", type=int, default=8000, help="of the server; its metrics are on the next")
    parser.add_argument("--internal-ports", type=int, default=30000, help="first of some 900 others that it takes")
    parsed = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phi-timeline-")))
        leak = folder / "leak"
        path = os.pathsep.join(
            filter(None, (str(Path(__file__).parent / "leaking_engine"), os.environ.get("PYTHONPATH")))
        )
        url, _ = stack.enter_context(
            own_server(CONFIG, parsed.port, parsed.internal_ports, {"PYTHONPATH": path, "PHI_BENCH_LEAK": str(leak)})
        )
        prometheus = Prometheus(folder, f"127.0.0.1:{parsed.port + 1}", lambda text: faster(text, parsed.faster))
        stack.callback(prometheus.close)
        timelines, failures = asyncio.run(run(url, prometheus, leak, parsed.screenshots))
    result = {
        "faster": parsed.faster,
        "fired": {one.alert: one.has_fired for one in timelines},
        "timelines": {one.fault: one.moments for one in timelines},
        "failed_turns": failures,
    }
    print(json.dumps(result))
    return 0 if all(one.has_fired for one in timelines) else 1


if __name__ == "__main__":
    sys.exit(main())
