"""What a burst of new sessions costs a stream that is running.

    phi-cluster serve &
    python tests/bench/burst.py --url http://127.0.0.1:8000 --sessions 64

Measures one stream's tokens a second three times, alternating: while nothing else happens, and while the actors of
`--sessions` new sessions are being spawned (their turns, of one token, are over by then). Also how soon the sessions of
the burst had their first token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
import uuid
from typing import Any

import httpx
from chat_load import send


async def stream_rate(client: httpx.AsyncClient, session: str, tokens: int) -> float:
    """Tokens a second between the first and the last token of one reply."""
    prompt = f"Tell me a long story, number {uuid.uuid4().hex[:6]}."
    turn = await send(client, session, [{"role": "user", "content": prompt}], tokens)
    return (turn.tokens - 1) / (turn.times[-1] - turn.times[0])


async def open_session(client: httpx.AsyncClient, session: str) -> float:
    """One turn of one token in a new session; seconds until it was over."""
    begin = time.perf_counter()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    response = await client.post("/v1/chat/completions", json=body, headers={"x-session-id": session})
    response.raise_for_status()
    return time.perf_counter() - begin


async def count_active(client: httpx.AsyncClient) -> int:
    page = (await client.get("/v1/sessions?limit=100")).json()
    return sum(session["state"] == "active" for session in page["data"])


async def measure(url: str, num_sessions: int, tokens: int, rounds: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=num_sessions + 8)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        run = uuid.uuid4().hex[:8]
        await stream_rate(client, f"burst-{run}", tokens)
        quiet, spawning, first, spawned = [], [], [], []
        for n in range(rounds):
            quiet.append(await stream_rate(client, f"burst-{run}", tokens))
            names = [f"burst-{run}-{n}-{i}" for i in range(num_sessions)]
            first.append(await asyncio.gather(*(open_session(client, name) for name in names)))
            before = await count_active(client)
            spawning.append(await stream_rate(client, f"burst-{run}", tokens))
            spawned.append(await count_active(client) - before)
            for name in names:
                await client.delete(f"/v1/sessions/{name}")
    slowest = [max(times) for times in first]
    ratio = statistics.median(b / a for a, b in zip(quiet, spawning, strict=True))
    return {
        "sessions": num_sessions,
        "first_reply_s_median_of_slowest": round(statistics.median(slowest), 2),
        "tokens_per_second_quiet": [round(rate, 1) for rate in quiet],
        "tokens_per_second_while_spawning": [round(rate, 1) for rate in spawning],
        "actors_spawned_meanwhile": spawned,
        "ratio_median": round(ratio, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parsed = parser.parse_args()
    print(json.dumps(asyncio.run(measure(parsed.url, parsed.sessions, parsed.tokens, parsed.rounds))))


if __name__ == "__main__":
    main()
