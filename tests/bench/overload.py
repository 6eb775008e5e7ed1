"""What too many requests cost: how soon those that are refused know it, and what those that were let in notice.

    phi-cluster serve config.yaml &            # with engine: {max_num_seqs: 4, max_waiting: 4}
    python tests/bench/overload.py --url http://127.0.0.1:8000 --streams 8 --rate 50 --seconds 10

`--streams` (as many as are let in) run alone for a while, then while `--rate` requests a second come besides, whether
they are answered or not. Told are the streams' time from token to token, both ways, and how long the others waited for
their 429s. The last line is JSON.
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


async def knock(client: httpx.AsyncClient, refused: list[float], served: list[float]) -> None:
    """One request of the flood."""
    begin = time.perf_counter()
    response = await client.post(_CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
    if response.status_code not in (200, 429):
        raise RuntimeError(f"status {response.status_code}: {response.text[:200]}")
    (refused if response.status_code == 429 else served).append(time.perf_counter() - begin)


async def flood(
    client: httpx.AsyncClient, rate: float, seconds: float, refused: list[float], served: list[float]
) -> None:
    """Requests at even distances."""
    begin, knocks = time.perf_counter(), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(begin + number / rate - time.perf_counter(), 0.0))
        knocks.append(asyncio.ensure_future(knock(client, refused, served)))
    await asyncio.gather(*knocks)


def percentile(values: list[float], share: float) -> float | None:
    """In milliseconds."""
    return round(sorted(values)[min(int(len(values) * share), len(values) - 1)] * 1000, 1) if values else None


async def measure(
    url: str, key: str | None, num_streams: int, rate: float, seconds: float, tokens: int
) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits, headers=headers) as client:
        quiet: list[float] = []
        await asyncio.gather(*(stream(client, tokens, quiet) for _ in range(num_streams)))
        loaded: list[float] = []
        refused: list[float] = []
        served: list[float] = []
        streams = [asyncio.ensure_future(stream(client, tokens, loaded)) for _ in range(num_streams)]
        # They are let in first.
        await asyncio.sleep(0.5)
        await flood(client, rate, seconds, refused, served)
        await asyncio.gather(*streams)
    return {
        "streams": num_streams,
        "requests_per_second": rate,
        "refused": len(refused),
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
    parser.add_argument("--key")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second beside them")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=400, help="length of the streams' replies")
    parsed = parser.parse_args()
    print(
        json.dumps(
            asyncio.run(measure(parsed.url, parsed.key, parsed.streams, parsed.rate, parsed.seconds, parsed.tokens))
        )
    )


if __name__ == "__main__":
    main()
