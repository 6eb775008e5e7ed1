"""Schemas without end: what thousands of them leave in memory, and what following one costs.

    phi-cluster serve &
    python tests/bench/schemas.py --unique 2000 --check
    python tests/bench/schemas.py --speed

`--unique`: so many requests, each with a schema that nobody has sent before (unique_schemas.py); those that can be
followed are answered and fit, the others are refused. Meanwhile the private memory of the server's processes is taken:
engine and replica must not grow (recycling_slope.py says how that is judged, and what the control is).

`--speed`: tokens a second at 1 and 16 streams, without a format, with one that leaves the choice among most tokens
(text in quotes), and with records, of whose text a part is forced. Rounds alternate, so that all three see the same
machine; ratios are of medians. Replies are of the same length, greedy. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import httpx
import jsonschema
from chat_load import open_client
from memory_samples import MemorySamples
from memory_slopes import CONTROL, Judgement, judge, problems, show, table
from sampled_run import sampled
from server_processes import find_server
from unique_schemas import unique_schema

_CHAT = "/v1/chat/completions"
_TEXT = {"type": "string", "minLength": 4000}
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "city": {"enum": ["Lima", "Oslo", "Rome"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
FORMATS: dict[str, dict[str, Any] | None] = {
    "free": None,
    "text": _TEXT,
    "records": {"type": "array", "items": _RECORD, "minItems": 200},
}


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "asked", "schema": schema}}


class Asking:
    """`total` requests, `workers` at a time, from the schema numbered `first` on; `failures` in words."""

    def __init__(self, client: httpx.AsyncClient, total: int, tokens: int, first: int):
        self._client = client
        self._total = total
        self._tokens = tokens
        self._first = first
        self._begun = 0
        self.done = self.finished = self.refused = 0
        self.failures: list[str] = []

    async def run(self, workers: int) -> None:
        await asyncio.gather(*(self._work(f"schemas-{number}") for number in range(workers)))

    async def _work(self, session: str) -> None:
        while self._begun < self._total:
            number = self._first + self._begun
            self._begun += 1
            if (failure := await self._ask(session, number)) is not None:
                self.failures.append(f"schema {number}: {failure}")
            self.done += 1
        (await self._client.delete(f"/v1/sessions/{session}")).raise_for_status()

    async def _ask(self, session: str, number: int) -> str | None:
        schema, is_followed = unique_schema(number)
        body = {
            "messages": [{"role": "user", "content": "Fill in the form."}],
            "max_tokens": self._tokens,
            "response_format": _format(schema),
        }
        answer = await self._client.post(_CHAT, json=body, headers={"x-session-id": session})
        if not is_followed:
            self.refused += 1
            return None if answer.status_code == 400 else f"not refused: {answer.status_code} {answer.text[:200]}"
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        [choice] = answer.json()["choices"]
        if choice["finish_reason"] != "stop":
            return None if choice["finish_reason"] == "length" else f"ended with {choice['finish_reason']}"
        self.finished += 1
        try:
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"does not fit: {str(error)[:200]}"
        return None


async def measure_memory(parsed: argparse.Namespace, server_pid: int) -> dict[str, Any]:
    """Requests, with a sample every `--every` of them."""
    samples = MemorySamples(server_pid)
    begin = time.perf_counter()
    limits = httpx.Limits(max_connections=parsed.workers + 2)
    async with httpx.AsyncClient(base_url=parsed.url, timeout=120.0, limits=limits) as client:
        # Another run's schemas are not these.
        asking = Asking(client, parsed.unique, parsed.reply, int(time.time()) * 10_000)
        await sampled(asking.run(parsed.workers), lambda: asking.done, samples, parsed.every, parsed.leak)
    by = Judgement("schema", parsed.unique, parsed.skip, parsed.every, parsed.limit, parsed.leak)
    rows = [row for row in judge(samples, by) if row["name"].startswith(("engine", "replica", CONTROL))]
    seconds = time.perf_counter() - begin
    print(
        f"{asking.done} schemas in {seconds:.0f} s: {asking.refused} refused, {asking.finished} replies complete and "
        f"valid, {len(asking.failures)} failures"
    )
    show(rows, by)
    found = problems(rows, by, asking.failures)
    counts = {"requests": asking.done, "refused": asking.refused, "complete": asking.finished}
    return {**counts, "seconds": round(seconds, 1), "rows": table(rows), "problems": found}


async def measure_speed(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """At each number of streams, rounds of all formats in turn."""
    results = []
    async with open_client(parsed.url, max(parsed.streams) + 4) as client:
        for num_streams in parsed.streams:
            rates: dict[str, list[float]] = {name: [] for name in FORMATS}
            # The first round does not count: grammars are compiled, prompts computed.
            for number in range(parsed.rounds + 1):
                for name, schema in FORMATS.items():
                    rate = await _round(client, num_streams, parsed.tokens, schema)
                    if number:
                        rates[name].append(rate)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            ratios = {name: round(median / medians["free"], 3) for name, median in medians.items()}
            results.append(
                {
                    "streams": num_streams,
                    "tokens_per_second": {name: round(median, 1) for name, median in medians.items()},
                    "by_round": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
                    "ratio": ratios,
                }
            )
            told = ", ".join(f"{name} {median:.1f} ({ratios[name]:.2f})" for name, median in medians.items())
            print(f"{num_streams:>3} streams  tok/s {told}", flush=True)
            for stream in range(num_streams):
                (await client.delete(f"/v1/sessions/schemas-{stream}")).raise_for_status()
    return results


async def _round(client: httpx.AsyncClient, num_streams: int, tokens: int, schema: dict[str, Any] | None) -> float:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Tell me about the people of the town, as JSON."}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    body |= {"ignore_eos": True} if schema is None else {"response_format": _format(schema)}

    async def say(stream: int) -> int:
        answer = await client.post(_CHAT, json=body, headers={"x-session-id": f"schemas-{stream}"})
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    begin = time.perf_counter()
    made = await asyncio.gather(*map(say, range(num_streams)))
    if min(made) < tokens:
        raise RuntimeError(f"a reply ended after {min(made)} tokens")
    return sum(made) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--server-pid", type=int)
    parser.add_argument("--unique", type=int, default=0, metavar="N", help="requests with a schema of their own")
    parser.add_argument("--reply", type=int, default=16, help="most tokens of their replies")
    parser.add_argument("--workers", type=int, default=4, help="requests at once")
    parser.add_argument("--skip", type=int, default=400, help="the first ones, which do not count")
    parser.add_argument("--every", type=int, default=10, help="requests between two samples")
    parser.add_argument("--limit", type=float, default=1000.0, help="bytes a schema")
    parser.add_argument("--leak", type=int, default=4096, help="bytes a schema of the control")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=96, help="length of each reply")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--check", action="store_true", help="exit status 1 if anything is not as it should be")
    parsed = parser.parse_args()
    answer: dict[str, Any] = {"url": parsed.url}
    found: list[str] = []
    if parsed.unique:
        answer["memory"] = asyncio.run(measure_memory(parsed, parsed.server_pid or find_server()))
        found = answer["memory"]["problems"]
        print("\n".join(found) or "as it should be")
    if parsed.speed:
        answer["speed"] = asyncio.run(measure_speed(parsed))
    print(json.dumps(answer))
    sys.exit(1 if parsed.check and found else 0)


if __name__ == "__main__":
    main()
