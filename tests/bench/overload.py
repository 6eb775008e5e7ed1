"""What too many requests cost: how soon those that are refused know it, and what those that were let in notice.

    phi-cluster serve config.yaml &            # with engine: {max_num_seqs: 4, max_waiting: 4}
    python tests/bench/overload.py --url http://127.0.0.1:8000 --streams 4 --flood 64 --seconds 10

`--streams` run alone for a while, then while `--flood` clients send requests as fast as they are answered. Told are the
streams' time from token to token, both ways, and how long the flood waited for its 429s. The last line is JSON.
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

_CHAT = "/v1/chat/completions"


async def stream(client: httpx.AsyncClient, tokens: int, gaps: list[float]) -> None:
    """One reply to its end; adds the seconds between its pieces."""
    prompt = f"Tell me a long story, number {uuid.uuid4().hex[:6]}."
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    last: float | None = None
    async with client.stream("POST", _CHAT, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                if last is not None:
                    gaps.append(now - last)
                last = now


async def flood(client: httpx.AsyncClient, until: float, refused: list[float], served: list[float]) -> None:
    """Requests one after the other."""
    while time.perf_counter() < until:
        begin = time.perf_counter()
        response = await client.post(_CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
        (refused if response.status_code == 429 else served).append(time.perf_counter() - begin)
        if response.status_code not in (200, 429):
            raise RuntimeError(f"status {response.status_code}: {response.text[:200]}")


def percentile(values: list[float], share: float) -> float | None:
    """In milliseconds."""
    return round(sorted(values)[min(int(len(values) * share), len(values) - 1)] * 1000, 1) if values else None


async def measure(url: str, num_streams: int, num_clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=num_streams + num_clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
        quiet: list[float] = []
        await asyncio.gather(*(stream(client, tokens, quiet) for _ in range(num_streams)))
        loaded: list[float] = []
        refused: list[float] = []
        served: list[float] = []
        streams = [asyncio.ensure_future(stream(client, tokens, loaded)) for _ in range(num_streams)]
        # They are let in first.
        await asyncio.sleep(0.5)
        until = time.perf_counter() + seconds
        await asyncio.gather(*(flood(client, until, refused, served) for _ in range(num_clients)))
        await asyncio.gather(*streams)
    return {
        "streams": num_streams,
        "flooding_clients": num_clients,
        "refused": len(refused),
        "refused_per_second": round(len(refused) / seconds, 1),
        "refused_ms_p50": percentile(refused, 0.5),
        "refused_ms_p99": percentile(refused, 0.99),
        "served": len(served),
        "inter_token_ms_quiet": round(statistics.median(quiet) * 1000, 1),
        "inter_token_ms_flooded": round(statistics.median(loaded) * 1000, 1),
        "inter_token_ms_flooded_p99": percentile(loaded, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--flood", type=int, default=64, help="clients that send too much")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=400, help="length of the streams' replies")
    parsed = parser.parse_args()
    print(json.dumps(asyncio.run(measure(parsed.url, parsed.streams, parsed.flood, parsed.seconds, parsed.tokens))))


if __name__ == "__main__":
    main()
