"""What an operator sees, and when: a real server, a real Prometheus with our rules, and three things that go wrong.

    python -m tests.bench.alert_timeline [--faster 20] [--screenshots FOLDER]

A load of conversations runs. Then (1) the KV budget is filled, (2) the engine leaks memory on purpose, twice, and (3)
it is killed again and again. Told is when each metric moved, when its alert became pending, fired and was
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Browser, async_playwright

# Run as a module it finds the others of this folder as when it is run as a file.
sys.path.insert(0, str(Path(__file__).parent))

from alert_watcher import Fault, Timeline, Watcher
from chat_load import Conversation
from own_server import own_server

from tests.prometheus import Prometheus

LEAK_NBYTES_PER_SECOND = 24 * 10**6
CONFIG = {
    "kv": {"budget": "128MiB", "hibernate_quota": 0},
    "engine": {"max_private_growth": "64MB", "standby_engines": 1},
    "sessions": {"spawn_interval": "200ms"},
}
_SETTLE_SECONDS = 60.0
_PATIENCE_SECONDS = 200.0
_KILLS = 4
# Of the live page, by fault.
_SHOWN = {
    "kv-full": ("#speeds", ".panel.memory"),
    "engine-leaks": (".panel.processes", ".panel.events"),
    "engine-killed": (".panel.processes", ".panel.events"),
}
_DURATION = re.compile(r"(?<=\[)\d+[hms](?=\])|(?<=offset )\d+[hms]|(?<=for: )\d+[hms]")
_UNIT = {"s": 1, "m": 60, "h": 3600}


def faster(rules: str, factor: float) -> str:
    """The rules' text with all periods divided by `factor`, and none below 2 s, which is two scrapes."""

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[0][:-1]) * _UNIT[match[0][-1]]
        return f"{max(round(seconds / factor), 2)}s"

    return _DURATION.sub(shorter, rules)


class Trouble:
    """Makes the faults."""

    def __init__(self, client: httpx.AsyncClient, leak: Path):
        self._client = client
        self._leak = leak
        self._full: list[Conversation] = []

    async def fill(self) -> None:
        """Conversations that idle, until the KV budget is nearly leased."""
        while (await self._usage()) < 0.97 and len(self._full) < 80:
            conversation = Conversation(self._client)
            await conversation.say(4, "word " * 250)
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

    async def kill(self) -> None:
        for _ in range(_KILLS):
            pid = (await self._engine())["pid"]
            os.kill(pid, signal.SIGKILL)
            await self._replaced(pid)

    async def leave_alone(self) -> None:
        pass

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
        page = await browser.new_page(viewport={"width": 1100, "height": 860}, color_scheme="light")
        await page.goto(f"{url}/ui")

        async def take(name: str) -> None:
            # It asks every four seconds for what is in these.
            await page.wait_for_timeout(4_500)
            boxes = [await page.locator(panel).bounding_box() for panel in _SHOWN[name]]
            left, top = (min(box[side] for box in boxes if box) for side in ("x", "y"))
            right = max(box["x"] + box["width"] for box in boxes if box)
            bottom = max(box["y"] + box["height"] for box in boxes if box)
            clip: Any = {"x": left, "y": top, "width": right - left, "height": bottom - top}
            await page.screenshot(path=folder / f"{name}.png", full_page=True, clip=clip)

        yield take
        await browser.close()


async def run(url: str, prometheus: Prometheus, leak: Path, folder: Path | None) -> tuple[list[Timeline], list[str]]:
    failures: list[str] = []
    timelines = []
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client, photographer(url, folder) as photograph:
        watcher = Watcher(client, prometheus, photograph)
        loading = asyncio.ensure_future(load(client, failures))
        await asyncio.sleep(5.0)
        for fault in faults(Trouble(client, leak)):
            timelines.append(await watcher.watch(fault, _PATIENCE_SECONDS))
            print(timelines[-1], flush=True)
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
    return timelines, failures


def faults(trouble: Trouble) -> Iterator[Fault]:
    yield Fault(
        "kv-full",
        "the KV budget is filled",
        "PhiKVNearBudget",
        "max(phi_kv_cache_usage_perc)",
        0.6,
        ("memory_given_way", "turn_refused"),
        trouble.fill,
        trouble.empty,
    )
    yield Fault(
        "engine-leaks",
        "the engine leaks, and so does the one after it",
        "PhiEngineLeaks",
        "max(phi_engine_private_bytes - phi_engine_private_baseline_bytes)",
        10e6,
        ("engine_recycled", "engine_took_over"),
        trouble.leak_twice,
    )
    yield Fault(
        "engine-killed",
        "the engine is killed again and again",
        "PhiRecoveryBurst",
        'sum(increase(phi_recoveries_total{component="engine"}[30s]))',
        0.5,
        ("engine_died", "engine_took_over", "engine_started"),
        trouble.kill,
        trouble.leave_alone,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faster", type=float, default=20.0, help="what the rules' periods are divided by")
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
