"""Tokens a second, time to first token, and CPU by process, through HTTP, at several numbers of streams.

    phi-cluster serve &
    python tests/bench/serving.py --url http://127.0.0.1:8000 --streams 1 8 16

Each stream has a session of its own and is measured at turn 2 or later, so every prompt is mostly cached. Replies are
forced to their full length (`ignore_eos`), greedy. CPU seconds are read from /proc for every process of the server
that serves the URL, and for this client. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

_TICKS = os.sysconf("SC_CLK_TCK")
_PROMPTS = (
    "Tell me about the sea.",
    "And what lives in it?",
    "Which of these is the largest, and how large is it?",
    "Explain that again, to a child.",
)


@dataclass
class Stream:
    """What one stream brought. Seconds since some fixed moment."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


def server_processes(server_pid: int) -> dict[int, str]:
    """Pids of a server's processes with a name for their kind: they inherit the name of its runtime folder."""
    mark = f"/phi-{server_pid}-".encode()
    found = {server_pid: "driver"}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if mark not in (entry / "environ").read_bytes():
                continue
        except OSError:
            continue
        found.setdefault(int(entry.name), kind_of(command))
    return found


def kind_of(command: str) -> str:
    """`ray::EngineActor` -> engine, and so on; the rest of Ray is one kind."""
    kinds = {
        "EngineActor": "engine",
        "ServeReplica": "replica",
        "SessionActor": "session actors",
        "Keeper": "keeper",
        "ray::Controller": "controller",
        "WeightStore": "weight store",
        "haproxy -db": "haproxy",
    }
    return next((kind for part, kind in kinds.items() if part in command), "ray")


def cpu_seconds(processes: dict[int, str]) -> dict[str, float]:
    """User and system time so far, by kind."""
    total: dict[str, float] = defaultdict(float)
    for pid, kind in processes.items():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total[kind] += (int(fields[11]) + int(fields[12])) / _TICKS
    total["client"] = sum(os.times()[:2])
    return total


async def turn(
    client: httpx.AsyncClient, messages: list[dict[str, str]], session: str, tokens: int, out: Stream
) -> str:
    """One streamed turn; adds its figures to `out` and returns the reply."""
    body = {
        "messages": messages,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = last = time.perf_counter()
    reply, first = "", True
    async with client.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": session}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            now = time.perf_counter()
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    (out.first if first else out.gaps).append(now - (begin if first else last))
                    first, last = False, now
                    reply += text
            if usage := event.get("usage"):
                out.tokens += usage["completion_tokens"]
                out.prompt_tokens += usage["prompt_tokens"]
                out.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    return reply


async def measure(url: str, num_streams: int, tokens: int, turns: int, processes: dict[int, str]) -> dict[str, Any]:
    """All streams at once: one turn to warm up, then `turns` that count."""
    limits = httpx.Limits(max_connections=num_streams + 4)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        run = uuid.uuid4().hex[:8]
        talks: list[list[dict[str, str]]] = [[] for _ in range(num_streams)]

        async def one(i: int, prompt: str, out: Stream) -> None:
            talks[i].append({"role": "user", "content": prompt})
            reply = await turn(client, talks[i], f"bench-{run}-{i}", tokens, out)
            talks[i].append({"role": "assistant", "content": reply})

        await asyncio.gather(*(one(i, _PROMPTS[0], Stream()) for i in range(num_streams)))
        streams = [Stream() for _ in range(num_streams)]
        rates = []
        cpu_before = cpu_seconds(processes)
        for n in range(turns):
            before = sum(s.tokens for s in streams)
            begin = time.perf_counter()
            await asyncio.gather(*(one(i, _PROMPTS[(n + 1) % len(_PROMPTS)], streams[i]) for i in range(num_streams)))
            rates.append((sum(s.tokens for s in streams) - before) / (time.perf_counter() - begin))
        cpu_after = cpu_seconds(processes)
        for i in range(num_streams):
            await client.delete(f"/v1/sessions/bench-{run}-{i}")
    generated = sum(s.tokens for s in streams)
    first = sorted(t for s in streams for t in s.first)
    gaps = sorted(t for s in streams for t in s.gaps)
    return {
        "streams": num_streams,
        "tokens_per_second": round(statistics.median(rates), 1),
        "tokens_per_second_by_turn": [round(rate, 1) for rate in rates],
        "ttft_ms_p50": round(statistics.median(first) * 1000, 1),
        "ttft_ms_max": round(first[-1] * 1000, 1),
        "inter_token_ms_p50": round(statistics.median(gaps) * 1000, 1),
        "cached_share": round(sum(s.cached_tokens for s in streams) / sum(s.prompt_tokens for s in streams), 3),
        "cpu_seconds_per_1000_tokens": {
            kind: round((cpu_after[kind] - cpu_before.get(kind, 0.0)) / generated * 1000, 2) for kind in cpu_after
        },
    }


def find_server(url: str) -> int:
    """The pid of the `phi-cluster serve` behind the URL, through its /proc entries. Raises SystemExit."""
    port = re.search(r":(\d+)", url.split("//")[-1])
    candidates = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and any(Path("/tmp").glob(f"phi-{entry.name}-*")):
            candidates.append(int(entry.name))
    if len(candidates) != 1:
        sys.exit(f"{len(candidates)} servers run here (port {port and port[1]}): name one with --server-pid")
    return candidates[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="length of each reply")
    parser.add_argument("--turns", type=int, default=3, help="turns that count, after one that does not")
    parser.add_argument("--server-pid", type=int)
    parsed = parser.parse_args()
    server = parsed.server_pid or find_server(parsed.url)
    results = []
    for num_streams in parsed.streams:
        # Looked up anew: session actors come and go.
        result = asyncio.run(measure(parsed.url, num_streams, parsed.tokens, parsed.turns, server_processes(server)))
        results.append(result)
        print(
            f"{num_streams:>3} streams  {result['tokens_per_second']:>7} tok/s   TTFT {result['ttft_ms_p50']} ms "
            f"(max {result['ttft_ms_max']})   between tokens {result['inter_token_ms_p50']} ms   "
            f"cached {result['cached_share']:.0%}   CPU s/1000 tokens {result['cpu_seconds_per_1000_tokens']}",
            flush=True,
        )
    print(json.dumps({"url": parsed.url, "tokens": parsed.tokens, "results": results}))


if __name__ == "__main__":
    main()
