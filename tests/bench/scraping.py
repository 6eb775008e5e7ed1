"""What it costs to be watched: a scrape with many sessions, and tokens a second alone, with a scraper, and with the
live page open too.

    python tests/bench/scraping.py --sessions 5000 --active 64          # the controller's part alone, no server
    phi-cluster serve &
    python tests/bench/scraping.py --url http://127.0.0.1:8000 --metrics http://127.0.0.1:9481/metrics --streams 8

The first makes a controller's view of so many sessions in memory and times what a scrape does. The second runs the same
turns in turn alone, with a scrape each second made by this process, and with that and the requests of an open page
(page_requests.py). Before that nothing is asked of the server, and the CPU time that its processes use is told for each
of the three: on a machine with neighbours that says more than tokens a second do. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
from chat_load import Conversation, open_client
from page_requests import page_requests
from prometheus_client import CollectorRegistry, Metric, generate_latest
from server_processes import CLIENT, CpuClock

from phi_cluster.cluster.cluster_view import ClusterView
from phi_cluster.cluster.engine_recycler import EngineReport
from phi_cluster.cluster.messages import ProcessId, SessionKey
from phi_cluster.cluster.replica_report import ReplicaReport
from phi_cluster.cluster.session.reports import KeeperReport, SessionReport
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics
from phi_cluster.monitoring.session_metrics import SessionMetrics

_NODE = "n" * 56
_IDLE_SECONDS = 24.0


class _Exporter:
    def __init__(self, view: ClusterView):
        self._view = view

    def collect(self) -> Iterator[Metric]:
        return self._view.families()


class _Times:
    """Of what is done within it, several times: medians in milliseconds, of this thread's CPU and of the clock."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def __exit__(self, *error: object) -> None:
        wall, cpu = self._began
        self._wall.append(time.perf_counter() - wall)
        self._cpu.append(time.thread_time() - cpu)

    @property
    def wall_ms(self) -> float:
        return round(statistics.median(self._wall) * 1000, 2)

    @property
    def cpu_ms(self) -> float:
        return round(statistics.median(self._cpu) * 1000, 2)


def _session(number: int, active: int) -> SessionReport:
    key = SessionKey("tenant", f"session-{number}")
    nbytes = 2**16 * (number % 400 + 1)
    stats = SessionStats(key, "active", False, 0, 20 * (number % 400), 19, nbytes, 3, 900.0, 60.0, 1, 0, 3, 90.0)
    return SessionReport(stats, 1000 + number if number < active else None, 45 * 10**6, 44 * 10**6)


def scrape_alone(num_sessions: int, num_active: int, rounds: int = 50) -> dict[str, Any]:
    """Of a scrape, and of the round in which the sessions are looked at."""
    view = ClusterView(1, 192 * 10**6, {"version": "0", "model": "bench"})
    sessions = [_session(number, num_active) for number in range(num_sessions)]
    snapshot = SessionMetrics(["idle"]).snapshot()
    report = KeeperReport(
        _NODE, ProcessId(1, 1), 10**11, 10**10, sessions, 0, 0, 0, 1, 9, {"idle": 1}, 6 * 10**7, {}, 0, snapshot
    )
    engine = EngineReport(1, 60.0, 100, 2 * 10**8, 2 * 10**8)
    counted = ReplicaMetrics(["leak"]).snapshot(3)
    view.take_replica(ReplicaReport("one", _NODE, 7, 60.0, counted, 10**8, ((8, 10**8),), engine, 0.1, 0.0))
    registry = CollectorRegistry()
    registry.register(_Exporter(view))
    scrapes, looks, text = _Times(), _Times(), b""
    for _ in range(rounds):
        with looks:
            view.take_keeper(report)
        with scrapes:
            text = generate_latest(registry)
    return {
        "sessions": num_sessions,
        "active": num_active,
        "scrape_cpu_ms": scrapes.cpu_ms,
        "scrape_ms_p50": scrapes.wall_ms,
        "round_cpu_ms": looks.cpu_ms,
        "round_ms_p50": looks.wall_ms,
        "series": sum(not line.startswith(b"#") for line in text.splitlines()),
        "bytes": len(text),
    }


async def _scrape(client: httpx.AsyncClient, metrics: str, seconds: list[float]) -> None:
    while True:
        begin = time.perf_counter()
        (await client.get(metrics)).raise_for_status()
        seconds.append(time.perf_counter() - begin)
        await asyncio.sleep(1.0)


async def with_and_without(
    url: str, metrics: str, num_streams: int, tokens: int, turns: int, server_pid: int | None
) -> dict[str, Any]:
    page = await page_requests(url)
    async with open_client(url, num_streams + 8) as client:
        scrapes: list[float] = []
        watchers: dict[str, list[Callable[[], Coroutine[Any, Any, None]]]] = {
            "alone": [],
            "scraped": [lambda: _scrape(client, metrics, scrapes)],
            "page_open": [lambda: _scrape(client, metrics, scrapes), lambda: page.repeat(client)],
        }
        # Its session actors and caches of the page's visit come to rest.
        await asyncio.sleep(3.0)
        cores = {} if server_pid is None else {name: await _cores(server_pid, each) for name, each in watchers.items()}
        rates: dict[str, list[float]] = {name: [] for name in watchers}
        for number in range(turns):
            # Conversations grow, so all begin anew; and the machine changes, so the order turns round each time.
            for name in list(watchers) if number % 2 == 0 else reversed(list(watchers)):
                rates[name].append(await _watched(client, num_streams, tokens, watchers[name]))
                print(f"{name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    alone = statistics.median(rates["alone"])
    return {
        "streams": num_streams,
        "tokens_per_second": {name: round(statistics.median(some), 1) for name, some in rates.items()},
        "of_alone": {name: round(statistics.median(some) / alone, 3) for name, some in rates.items()},
        "of_alone_in_pairs": {
            name: round(statistics.median(a / b for a, b in zip(some, rates["alone"], strict=True)), 3)
            for name, some in rates.items()
        },
        "by_turn": {name: [round(rate, 1) for rate in some] for name, some in rates.items()},
        "idle_cores": cores,
        "page_requests_per_second": round(page.per_second, 2),
        "scrape_ms_p50": round(statistics.median(scrapes) * 1000, 1),
    }


async def _cores(server_pid: int, watchers: list[Callable[[], Coroutine[Any, Any, None]]]) -> dict[str, float]:
    """CPU seconds a second that each kind of process of a server takes to which nobody talks, and all of them."""
    watching = [asyncio.create_task(watcher()) for watcher in watchers]
    clock, begin = CpuClock(server_pid), time.perf_counter()
    await asyncio.sleep(_IDLE_SECONDS)
    used, seconds = clock.seconds(), time.perf_counter() - begin
    await _end(watching)
    used.pop(CLIENT, None)
    each = {kind: round(value / seconds, 4) for kind, value in used.items() if value / seconds >= 0.0005}
    return {**each, "all": round(sum(used.values()) / seconds, 4)}


async def _end(watching: list[asyncio.Task[None]]) -> None:
    for task in watching:
        # One that has failed says so, instead of being measured as nothing.
        if not task.cancel():
            task.result()
    await asyncio.gather(*watching, return_exceptions=True)


async def _watched(
    client: httpx.AsyncClient,
    num_streams: int,
    tokens: int,
    watchers: list[Callable[[], Coroutine[Any, Any, None]]],
) -> float:
    """Tokens a second of new conversations' second turns."""
    conversations = [Conversation(client) for _ in range(num_streams)]
    await asyncio.gather(*(one.say(8) for one in conversations))
    watching = [asyncio.create_task(watcher()) for watcher in watchers]
    begin = time.perf_counter()
    brought = await asyncio.gather(*(one.say(tokens) for one in conversations))
    seconds = time.perf_counter() - begin
    await _end(watching)
    for one in conversations:
        await one.delete()
    return sum(turn.tokens for turn in brought) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=5000)
    parser.add_argument("--active", type=int, default=64)
    parser.add_argument("--url")
    parser.add_argument("--metrics", default="http://127.0.0.1:9481/metrics")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="length of each reply")
    parser.add_argument("--turns", type=int, default=6, help="rounds of all three")
    parser.add_argument("--server-pid", type=int, help="the server's process, to tell its CPU time too")
    parsed = parser.parse_args()
    if parsed.url is None:
        result = scrape_alone(parsed.sessions, parsed.active)
    else:
        result = asyncio.run(
            with_and_without(parsed.url, parsed.metrics, parsed.streams, parsed.tokens, parsed.turns, parsed.server_pid)
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
