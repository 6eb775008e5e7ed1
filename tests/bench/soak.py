"""Two hundred users who come back: conversations with pauses, on a server that recycles and hibernates all the time.

    python -m tests.bench.soak --minutes 10

Starts a server of its own (`--url` and `--server-pid` name another one) whose periods are seconds instead of hours, and
whose memory and disk for caches are small, so that returning turns find their session warm, asleep, or not computed at
all any more. Each user says something, thinks for a while (exponentially distributed), and goes on; a conversation ends
after some turns, deleted or simply left, and the user begins another one.

Told are the times to the first token of returning turns by what they found, the memory of each kind of process over
time, and what failed. A 429 is no failure: the user waits as long as it says and asks again. Exit status 1 if anything
failed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx

# Run as a module it finds the others of this folder as when it is run as a file.
sys.path.insert(0, str(Path(__file__).parent))

from chat_load import Conversation, Refused, Turn
from memory_samples import MemorySamples
from own_server import own_server
from text_plot import draw

CONFIG = {
    "sessions": {
        "max_age": "20s",
        "max_turns": 6,
        "idle_timeout": "10s",
        "hibernate_after": "20s",
        "max_actors": 12,
        "spawn_interval": "500ms",
        "retention": "10m",
    },
    "recycler": {"interval": "500ms"},
    "engine": {"max_age": "120s"},
    "kv": {"budget": "192MiB", "hibernate_quota": "256MiB"},
}
_TOKENS = 12
_TURNS = 8
# One of so many users leaves a conversation behind instead of deleting it.
_LEAVES = 4
_SAMPLE_SECONDS = 5.0
_PATIENCE = 10


class Soak:
    """All users of one run. `found` are the seconds to the first token of returning turns, by what these found."""

    def __init__(self, client: httpx.AsyncClient, think_seconds: float, seed: int):
        self._client = client
        self._think_seconds = think_seconds
        self._seed = seed
        self.found: dict[str, list[float]] = defaultdict(list)
        self.first_turns: list[float] = []
        self.refusals: Counter[int] = Counter()
        self.failures: list[str] = []
        self.turns = 0
        self.conversations = 0

    async def run(self, num_users: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(self._user(random.Random(f"{self._seed} {n}"), deadline) for n in range(num_users)))

    async def _user(self, rng: random.Random, deadline: float) -> None:
        # Not all of them at once.
        await _sleep(rng.uniform(0.0, self._think_seconds), deadline)
        while time.monotonic() < deadline:
            conversation = Conversation(self._client)
            self.conversations += 1
            try:
                for _ in range(rng.randint(2, _TURNS)):
                    if time.monotonic() >= deadline:
                        break
                    await self._turn(conversation)
                    await _sleep(rng.expovariate(1.0 / self._think_seconds), deadline)
                if rng.randrange(_LEAVES):
                    await conversation.delete()
            except (RuntimeError, httpx.HTTPError, KeyError) as error:
                self.failures.append(f"{conversation.session}: {type(error).__name__}: {error}"[:300])

    async def _turn(self, conversation: Conversation) -> None:
        for _ in range(_PATIENCE):
            state = await self._state(conversation)
            known = sum(len(message["content"]) for message in conversation.messages)
            try:
                turn = await conversation.say(_TOKENS)
            except Refused as refused:
                if refused.status != 429:
                    raise
                self.refusals[refused.status] += 1
                await asyncio.sleep(refused.retry_after)
                continue
            self.turns += 1
            self._take(turn, state if known else None)
            return
        raise RuntimeError(f"refused {_PATIENCE} times in a row")

    def _take(self, turn: Turn, state: str | None) -> None:
        if state is None:
            self.first_turns.append(turn.time_to_first_token)
        elif not turn.cached_tokens:
            self.found["replayed"].append(turn.time_to_first_token)
        else:
            self.found["woken" if state == "hibernated" else "warm"].append(turn.time_to_first_token)

    async def _state(self, conversation: Conversation) -> str | None:
        if not conversation.messages:
            return None
        response = await self._client.get(f"/v1/sessions/{conversation.session}")
        response.raise_for_status()
        return str(response.json()["state"])


async def _sleep(seconds: float, deadline: float) -> None:
    await asyncio.sleep(max(min(seconds, deadline - time.monotonic()), 0.0))


async def measure(url: str, server_pid: int, parsed: argparse.Namespace) -> tuple[Soak, MemorySamples]:
    samples = MemorySamples(server_pid)
    limits = httpx.Limits(max_connections=parsed.users + 10)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits) as client:
        soak = Soak(client, parsed.think, parsed.seed)
        begin = time.monotonic()
        running = asyncio.ensure_future(soak.run(parsed.users, 60.0 * parsed.minutes))
        while not running.done():
            samples.take(time.monotonic() - begin)
            await asyncio.wait({running}, timeout=_SAMPLE_SECONDS)
        await running
    return soak, samples


def told(values: list[float]) -> dict[str, Any]:
    """Milliseconds, and how many."""
    if not values:
        return {"turns": 0}
    ordered = sorted(values)
    return {
        "turns": len(ordered),
        "p50_ms": round(statistics.median(ordered) * 1000),
        "p99_ms": round(ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)] * 1000),
    }


def halves(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The most of each half of the samples."""
    middle = max(len(points) // 2, 1)
    return max(y for _, y in points[:middle]), max(y for _, y in points[middle:] or points)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--think", type=float, default=60.0, help="mean seconds between two turns of a user")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--port", type=int, default=8000, help="of the server that is started; it takes some 1,000 more"
    )
    parser.add_argument("--url", help="a server that runs")
    parser.add_argument("--server-pid", type=int, help="its process")
    parsed = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        url, pid = parsed.url, parsed.server_pid
        if url is None or pid is None:
            url, pid = stack.enter_context(own_server(CONFIG, parsed.port, parsed.port + 2))
        soak, samples = asyncio.run(measure(url, pid, parsed))
    memory = {part: [(x, nbytes / 1e6) for x, nbytes, _ in points] for part, points in samples.totals().items()}
    memory["all of them"] = samples.sum_over_time(1e6)
    print("\n".join(draw(memory, 60, "MB private")))
    result = {
        "users": parsed.users,
        "minutes": parsed.minutes,
        "turns": soak.turns,
        "conversations": soak.conversations,
        "first": told(soak.first_turns),
        **{name: told(soak.found[name]) for name in ("warm", "woken", "replayed")},
        "refused_and_asked_again": sum(soak.refusals.values()),
        "failures": len(soak.failures),
        # Private memory of all processes together: the most in the first half of the run, and in the second.
        "most_mb": [round(most) for most in halves(memory["all of them"])],
    }
    print(
        f"{soak.turns} turns of {soak.conversations} conversations, {len(soak.failures)} failures", *soak.failures[:10]
    )
    for name in ("first", "warm", "woken", "replayed"):
        print(f"time to first token, {name}: {result[name]}")
    print(json.dumps(result))
    return 1 if soak.failures or not soak.turns else 0


if __name__ == "__main__":
    sys.exit(main())
