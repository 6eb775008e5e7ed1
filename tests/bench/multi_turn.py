"""Conversations through HTTP: tokens a second, time to first token, CPU by process, and what a cache is worth.

    phi-cluster serve &
    python tests/bench/multi_turn.py --streams 1 4 8 16 32
    python tests/bench/multi_turn.py --returning

Each stream is a named session and is measured at turn 2 or later, when it has its actor (which it is given after its
first turn), so every prompt is mostly cached; turns are committed to the journal, as always. Replies are forced to
their full length (`ignore_eos`), greedy. All streams begin a turn together; the steady rate counts what came while all
of them were generating. CPU seconds are read from /proc for every process of the server that runs here, and for this
client.

`--returning` compares the time to first token of a turn with few new tokens in a long session to that of the same
prompt after the session was cleared, in pairs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx
from chat_load import Conversation, Turn, open_client
from peers.process import wait_until_quiet
from server_processes import CLIENT, CpuClock, find_server, overhead, per_thousand_tokens

# Processes that start one after the other take more, with pauses of less.
_STARTING_CORES, _PAUSE_SECONDS = 0.8, 2.0
_STORY = "The lighthouse keeper number {n} wrote down the weather, the ships, and what the gulls had stolen that day. "
_QUESTION = "What did the keeper write down on the last day, and why?"


def steady_rate(turns: Sequence[Turn]) -> float:
    """Tokens a second between the moment when the last of them had its first token and the moment when the first of
    them had its last. Pieces of text stand for tokens, as many as the turn had in all."""
    begin, end = max(turn.times[0] for turn in turns), min(turn.times[-1] for turn in turns)
    if end <= begin:
        return 0.0
    tokens = 0.0
    for turn in turns:
        pieces = sum(begin < moment <= end for moment in turn.times)
        tokens += pieces * turn.tokens / len(turn.times)
    return tokens / (end - begin)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` % of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


async def measure(client: httpx.AsyncClient, num_streams: int, parsed: argparse.Namespace, pid: int) -> dict[str, Any]:
    """All streams at once: one turn that does not count, then those that do."""
    tokens, num_turns = parsed.tokens, parsed.turns
    conversations = [Conversation(client) for _ in range(num_streams)]
    try:
        await asyncio.gather(*(one.say(tokens) for one in conversations))
        # Each costs some CPU seconds to start, once; and when all have theirs, others are started to be spare.
        num_actors = sum(await asyncio.gather(*(one.gets_actor(parsed.settle) for one in conversations)))
        await asyncio.to_thread(wait_until_quiet, _STARTING_CORES, parsed.settle, _PAUSE_SECONDS)
        rounds, rates = [], []
        clock = CpuClock(pid)
        for _ in range(num_turns):
            begin = time.perf_counter()
            rounds.append(await asyncio.gather(*(one.say(tokens) for one in conversations)))
            rates.append(sum(turn.tokens for turn in rounds[-1]) / (time.perf_counter() - begin))
        cpu = clock.seconds()
    finally:
        await asyncio.gather(*(one.delete() for one in conversations))
    turns = [turn for turns in rounds for turn in turns]
    first = [turn.time_to_first_token * 1000 for turn in turns]
    gaps = [(b - a) * 1000 for turn in turns for a, b in zip(turn.times, turn.times[1:], strict=False)]
    return {
        "streams": num_streams,
        "actors": num_actors,
        "steady_tokens_per_second": round(statistics.median(steady_rate(turns) for turns in rounds), 1),
        "tokens_per_second": round(statistics.median(rates), 1),
        "tokens_per_second_by_turn": [round(rate, 1) for rate in rates],
        "ttft_ms_p50": round(percentile(first, 50), 1),
        "ttft_ms_p99": round(percentile(first, 99), 1),
        "inter_token_ms_p50": round(percentile(gaps, 50), 1),
        "inter_token_ms_p99": round(percentile(gaps, 99), 1),
        "cached_share": round(sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns), 3),
        "cpu_seconds_per_1000_tokens": per_thousand_tokens(cpu, sum(turn.tokens for turn in turns)),
        "overhead": round(overhead(cpu), 3),
    }


async def measure_returning(client: httpx.AsyncClient, context: int, repeat: int) -> dict[str, Any]:
    """Pairs of the same prompt: in a session that holds all but its last question, and in that session cleared."""
    returning, anew = [], []
    sentences = context // await count_tokens(client, _STORY.format(n=0)) + 1
    for n in range(repeat):
        conversation = Conversation(client)
        # From the first words on no two of these are alike.
        await conversation.say(8, f"{conversation.session}. " + _STORY.format(n=n) * sentences)
        returning.append(await conversation.say(8, _QUESTION))
        await conversation.clear()
        # The same prompt again: what was said before that question.
        del conversation.messages[-2:]
        anew.append(await conversation.say(8, _QUESTION))
        await conversation.delete()
        print(f"pair {n + 1}: {_show(returning[-1])}; cleared: {_show(anew[-1])}", flush=True)
    first = [statistics.median(turn.time_to_first_token for turn in turns) for turns in (returning, anew)]
    pairs = zip(returning, anew, strict=True)
    ratio = statistics.median(b.time_to_first_token / a.time_to_first_token for a, b in pairs)
    return {
        "prompt_tokens": returning[-1].prompt_tokens,
        "cached_tokens": returning[-1].cached_tokens,
        "cached_tokens_cleared": anew[-1].cached_tokens,
        "ttft_ms_returning": round(first[0] * 1000, 1),
        "ttft_ms_cleared": round(first[1] * 1000, 1),
        "ratio": round(ratio, 1),
    }


async def count_tokens(client: httpx.AsyncClient, text: str) -> int:
    """How many tokens the server takes `text` for."""
    response = await client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
    response.raise_for_status()
    return int(response.json()["usage"]["prompt_tokens"])


def _show(turn: Turn) -> str:
    return f"{turn.time_to_first_token * 1000:.0f} ms ({turn.prompt_tokens} tokens, {turn.cached_tokens} cached)"


def _row(result: dict[str, Any]) -> str:
    cpu = result["cpu_seconds_per_1000_tokens"]
    server = ", ".join(f"{kind} {share}" for kind, share in cpu.items() if kind != CLIENT)
    return (
        f"{result['streams']:>3} streams  {result['steady_tokens_per_second']:>7} tok/s steady, "
        f"{result['tokens_per_second']} in all   TTFT p50 {result['ttft_ms_p50']} p99 {result['ttft_ms_p99']} ms   "
        f"between tokens {result['inter_token_ms_p50']} ms   cached {result['cached_share']:.0%}\n"
        f"             CPU s per 1,000 tokens: {server}; outside the engine {result['overhead']:.0%} of inside; "
        f"client {cpu.get(CLIENT, 0.0)}"
    )


async def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints everything; the same as JSON-able values."""
    async with open_client(parsed.url, max(parsed.streams) + 4) as client:
        if parsed.returning:
            result = await measure_returning(client, parsed.context, parsed.turns)
            print(
                f"first token of {result['prompt_tokens']} tokens, {result['cached_tokens']} cached: "
                f"{result['ttft_ms_returning']} ms; cleared: {result['ttft_ms_cleared']} ms; 1/{result['ratio']}"
            )
            return {"url": parsed.url, "returning": result}
        results = []
        server = parsed.server_pid or find_server()
        for num_streams in parsed.streams:
            results.append(await measure(client, num_streams, parsed, server))
            print(_row(results[-1]), flush=True)
        return {"url": parsed.url, "tokens": parsed.tokens, "results": results}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=64, help="length of each reply")
    parser.add_argument("--turns", type=int, default=3, help="turns (or pairs) that count")
    parser.add_argument(
        "--settle", type=float, default=150.0, help="seconds that sessions may take to get their actors"
    )
    parser.add_argument("--server-pid", type=int)
    parser.add_argument("--returning", action="store_true", help="what the cache of a long session is worth")
    parser.add_argument("--context", type=int, default=2000, help="tokens in that session")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(parse()))))
