"""How long streams pause when their engine dies: engines are killed again and again, each under 8 mixed streams.

    phi-cluster serve &
    python tests/bench/pauses.py --url http://127.0.0.1:8000 --kills 100

Greedy and sampled streams, with penalties, stop strings and logit_bias, each in a session of its own. Every round has
new ones (a request on which two engines died is failed), begins when an engine stands by (if the server keeps one) and
kills the engine at a random moment in the middle of all replies. A pause is the longest time between two pieces of text
of a stream from the kill on; beside it stands the usual time between two pieces. Every reply and its usage are compared
with an undisturbed round's. `--signal STOP` stops the engine instead, which must be noticed first. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import httpx

_PATIENCE_SECONDS = 120.0
_STREAMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Tell me a story about a fox.", {"temperature": 0}),
    ("Repeat again and again: one two three, one two three.", {"temperature": 0}),
    ("Tell me a story about rain.", {"temperature": 1.0, "seed": 5}),
    ("Describe Lima.", {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "seed": 6}),
    ("List twenty animals.", {"temperature": 0.7, "seed": 7, "repetition_penalty": 1.2, "frequency_penalty": 0.5}),
    ("What is a lighthouse?", {"temperature": 0, "presence_penalty": 1.0}),
    ("Tell me about the number 7.", {"temperature": 0.9, "seed": 8, "logit_bias": {"28": 3.0, "30": -100.0}}),
    ("Explain how bread is made.", {"temperature": 0, "stop": ["never said", "neither this"]}),
)


@dataclass
class Reply:
    """One streamed reply. `times` are the moments of its pieces of text."""

    session: str
    times: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    async def receive(self, client: httpx.AsyncClient, question: str, fields: dict[str, Any], tokens: int) -> None:
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        headers = {"x-session-id": self.session}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.is_error:
                self.error = (await answer.aread()).decode(errors="replace")
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.error = event["error"]["message"]
                    return
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        self.times.append(time.perf_counter())
                        self.text += piece
                self.usage = event.get("usage") or self.usage

    def pause(self, killed_at: float) -> float:
        """The longest time between two pieces that ended after the kill."""
        return max((b - a for a, b in itertools.pairwise(self.times) if b > killed_at), default=0.0)


class Bench:
    """A server, asked over and over."""

    def __init__(self, client: httpx.AsyncClient, metrics_url: str, tokens: int):
        self._client = client
        self._metrics_url = metrics_url
        self._tokens = tokens

    async def engines(self) -> tuple[int, int]:
        """How many were lost while they served, and how many stand by, both of one moment (about a second ago)."""
        lost, standing_by = 0.0, 0.0
        for line in (await self._client.get(self._metrics_url)).text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("phi_recoveries_total{") and 'component="engine"' in name:
                lost += float(value)
            elif name == "phi_standby_engines":
                standing_by = float(value)
        return int(lost), int(standing_by)

    async def wait_standbys(self, lost: int, wanted: int) -> None:
        """Until so many stand by after so many were lost: what was true before the last one died does not count."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            now_lost, standing_by = await self.engines()
            if now_lost >= lost and standing_by >= wanted:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{standing_by} engines stand by after {_PATIENCE_SECONDS:g} s, {wanted} did before")
            await asyncio.sleep(0.2)

    async def round(self, number: signal.Signals | None) -> tuple[list[Reply], float]:
        """Eight replies, and the moment at which their engine was killed."""
        replies = [Reply(f"pauses-{uuid.uuid4().hex}") for _ in _STREAMS]
        running = [
            asyncio.create_task(reply.receive(self._client, question, fields, self._tokens))
            for reply, (question, fields) in zip(replies, _STREAMS, strict=True)
        ]
        killed_at = float("inf")
        if number is not None:
            least = random.randint(2, self._tokens // 2)
            while not all(len(reply.times) >= least or reply.error for reply in replies):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            described = await self._client.get(f"/v1/sessions/{replies[0].session}")
            os.kill(described.raise_for_status().json()["engine_pid"], number)
            killed_at = time.perf_counter()
        await asyncio.gather(*running)
        for reply in replies:
            await self._client.delete(f"/v1/sessions/{reply.session}")
        return replies, killed_at


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_ms": round(statistics.median(ordered) * 1000),
        "p99_ms": round(ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)] * 1000),
        "max_ms": round(ordered[-1] * 1000),
    }


async def measure(url: str, metrics_url: str, kills: int, tokens: int, number: signal.Signals) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=32)
    pauses: list[float] = []
    worst: list[float] = []
    errors: list[str] = []
    changed = 0
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        bench = Bench(client, metrics_url, tokens)
        lost, wanted = await bench.engines()
        undisturbed, _ = await bench.round(None)
        usual = [b - a for reply in undisturbed for a, b in itertools.pairwise(reply.times)]
        for done in range(1, kills + 1):
            await bench.wait_standbys(lost + done - 1, wanted)
            replies, killed_at = await bench.round(number)
            some = [reply.pause(killed_at) for reply in replies]
            pauses += some
            worst.append(max(some))
            errors += [reply.error for reply in replies if reply.error]
            pairs = zip(replies, undisturbed, strict=True)
            changed += sum((one.text, one.usage) != (other.text, other.usage) for one, other in pairs)
            print(f"{done:>4}  {' '.join(f'{pause * 1000:6.0f}' for pause in some)} ms", flush=True)
    return {
        "kills": kills,
        "signal": number.name,
        "standby_engines": wanted,
        "streams": len(_STREAMS),
        "tokens": tokens,
        "pauses": summary(pauses),
        "longest_pause_of_each_kill": summary(worst),
        "usual_time_between_pieces": summary(usual),
        "replies": len(pauses),
        "replies_that_changed": changed,
        "errors": len(errors),
        "first_errors": errors[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--metrics-url", default="http://127.0.0.1:9481/metrics")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64, help="length of each reply")
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parsed = parser.parse_args()
    number = signal.Signals[f"SIG{parsed.signal}"]
    result = asyncio.run(measure(parsed.url, parsed.metrics_url, parsed.kills, parsed.tokens, number))
    print(
        f"{result['kills']} engines, {result['standby_engines']} standing by each time: pauses p50 "
        f"{result['pauses']['p50_ms']} ms, p99 {result['pauses']['p99_ms']} ms, max {result['pauses']['max_ms']} ms   "
        f"{result['replies']} replies, {result['replies_that_changed']} changed, {result['errors']} errors"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
