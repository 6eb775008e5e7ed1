"""How throughput grows with machines, where two cores cannot show it: engines sleep 20 ms a step instead of computing.

    python -m tests.bench.nodes [--machines 4] [--streams 3] [--turns 6] [--tokens 64]
    python -m tests.bench.nodes --all-at-once --first-choice session|least_connections

Each machine is a network namespace with an address of its own (root, iproute2, redis-server); the head serves, the
others join one after the other. With each number of machines, `--streams` conversations for each of them hold turns
through the head's ingress, all at once: tokens a second of the steady part of each turn (the median of the turns),
against as many times that of one machine; the time to the first token, median; where the sessions lie; how many were
moved or forwarded, by the metrics. With `--all-at-once` only with all machines: two runs, one with each
`--first-choice`, show what HAProxy's choice by session is worth. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

BENCH = Path(__file__).parent
sys.path.insert(0, str(BENCH))

from chat_load import Conversation  # noqa: E402
from multi_turn import steady_rate  # noqa: E402

from tests.cluster.hosts import why_not  # noqa: E402
from tests.cluster.machines import PORT, Cluster, on_hosts  # noqa: E402

STEP_SECONDS = 0.02
SETTINGS = {
    "engine": {"num_threads": 1, "standby_engines": 0, "max_num_seqs": 16},
    "kv": {"budget": "200MB"},
    "sessions": {"max_actors": 8},
}


def wait_for(check: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if answer := check():
                return answer
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"not within {timeout:.0f} s: {what}")


async def measure(cluster: Cluster, num_streams: int, num_turns: int, tokens: int) -> dict[str, Any]:
    """The rate of the turns behind the first, and where the sessions were."""
    headers = {"authorization": f"Bearer {cluster.key}"}
    base = f"http://{cluster.head.address}:{PORT}"
    limits = httpx.Limits(max_connections=4 * num_streams)
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=120, limits=limits) as client:
        conversations = [Conversation(client) for _ in range(num_streams)]
        await asyncio.gather(*(one.say(tokens) for one in conversations))
        rates, first_tokens = [], []
        for _ in range(num_turns):
            turns = await asyncio.gather(*(one.say(tokens) for one in conversations))
            rates.append(steady_rate(turns))
            first_tokens += [turn.time_to_first_token for turn in turns]
        found = (await client.get("/v1/sessions", params={"limit": 1000})).json()["data"]
        places = Counter(one["node_id"][:6] for one in found if one["node_id"])
        for one in conversations:
            await one.delete()
    return {
        "rate": statistics.median(rates),
        "rates": rates,
        "first_token_seconds": statistics.median(first_tokens),
        "sessions": sorted(places.values(), reverse=True),
    }


def counters(cluster: Cluster) -> dict[str, float]:
    """Of moved and forwarded turns, as the head's metrics have them."""
    done = cluster.head.host.run(["curl", "-s", "http://127.0.0.1:9481/metrics"])
    found: Counter[str] = Counter()
    for line in done.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith(("phi_session_moves_total", "phi_forwarded_turns_total")):
            found[name.partition("{")[0]] += float(value)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--streams", type=int, default=3, help="conversations for each machine")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--all-at-once", action="store_true", help="measure with all machines only")
    parser.add_argument("--first-choice", choices=("auto", "session", "least_connections"), default="auto")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    paths = filter(None, (str(BENCH / "sleeping_engine"), os.environ.get("PYTHONPATH")))
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PHI_BENCH_STEP_SECONDS": str(STEP_SECONDS)}
    rows = []
    settings = {**SETTINGS, "replicas": arguments.machines, "server": {"first_choice": arguments.first_choice}}
    with (
        tempfile.TemporaryDirectory(prefix="pn-") as folder,
        on_hosts(Path(folder), arguments.machines, wait_for, settings) as cluster,
    ):
        print(f"{'machines':>8} {'tok/s':>7} {'of linear':>9} {'TTFT ms':>8}  sessions by machine", flush=True)
        for number, machine in enumerate((cluster.head, *cluster.others), 1):
            machine.start("Ready in" if number == 1 else "Joined")
            wait_for(lambda n=number: cluster.num_serving() == n, f"{number} machines that serve", 180)
            if arguments.all_at_once and number < arguments.machines:
                continue
            before = counters(cluster)
            row = asyncio.run(measure(cluster, number * arguments.streams, arguments.turns, arguments.tokens))
            after = counters(cluster)
            rows.append(row)
            # Against one machine's, where that was measured.
            linear = None if arguments.all_at_once else rows[0]["rate"] * number
            row |= {"machines": number, "of_linear": linear and row["rate"] / linear}
            row["counted"] = {name: after[name] - before.get(name, 0.0) for name in after}
            share = f"{row['of_linear']:.2f}" if linear else "-"
            print(
                f"{number:>8} {row['rate']:>7.0f} {share:>9} {1000 * row['first_token_seconds']:>8.0f}  "
                f"{row['sessions']}  {row['counted']}",
                flush=True,
            )
    print(json.dumps({"step_seconds": STEP_SECONDS, "rows": rows}))


if __name__ == "__main__":
    main()
