"""Tokens a second, time to first token, and CPU by process, through HTTP, at several numbers of streams.

    phi-cluster serve &
    python tests/bench/serving.py --url http://127.0.0.1:8000 --streams 1 8 16

Each stream has a session of its own and is measured at turn 2 or later, so every prompt is mostly cached. Replies are
forced to their full length (`ignore_eos`), greedy. CPU seconds are read from /proc for every process of the server
that runs here, and for this client. `multi_turn.py` measures more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

from chat_load import Conversation, open_client
from server_processes import CpuClock, find_server, per_thousand_tokens


async def measure(url: str, num_streams: int, tokens: int, num_turns: int, server_pid: int) -> dict[str, Any]:
    """All streams at once: one turn to warm up, then `num_turns` that count."""
    async with open_client(url, num_streams + 4) as client:
        conversations = [Conversation(client) for _ in range(num_streams)]
        await asyncio.gather(*(one.say(tokens) for one in conversations))
        turns, rates = [], []
        clock = CpuClock(server_pid)
        for _ in range(num_turns):
            begin = time.perf_counter()
            brought = await asyncio.gather(*(one.say(tokens) for one in conversations))
            rates.append(sum(turn.tokens for turn in brought) / (time.perf_counter() - begin))
            turns += brought
        cpu = clock.seconds()
        for one in conversations:
            await one.delete()
    first = sorted(turn.time_to_first_token for turn in turns)
    gaps = [b - a for turn in turns for a, b in zip(turn.times, turn.times[1:], strict=False)]
    return {
        "streams": num_streams,
        "tokens_per_second": round(statistics.median(rates), 1),
        "tokens_per_second_by_turn": [round(rate, 1) for rate in rates],
        "ttft_ms_p50": round(statistics.median(first) * 1000, 1),
        "ttft_ms_max": round(first[-1] * 1000, 1),
        "inter_token_ms_p50": round(statistics.median(gaps) * 1000, 1),
        "cached_share": round(sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns), 3),
        "cpu_seconds_per_1000_tokens": per_thousand_tokens(cpu, sum(turn.tokens for turn in turns)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="length of each reply")
    parser.add_argument("--turns", type=int, default=3, help="turns that count, after one that does not")
    parser.add_argument("--server-pid", type=int)
    parsed = parser.parse_args()
    server = parsed.server_pid or find_server()
    results = []
    for num_streams in parsed.streams:
        result = asyncio.run(measure(parsed.url, num_streams, parsed.tokens, parsed.turns, server))
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
