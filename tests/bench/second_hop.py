"""What a second hop costs: turns that reach the node of their session against those that reach the other one.

A Ray cluster of two nodes on this machine, each with a replica and an engine thread; a conversation on the second node
is asked something again and again, in turn at its own replica and at the other's, which sends the turn on. The
difference is the hop's: in time to the first token, in time for a token, and in CPU seconds of both replicas.

    python -m tests.bench.second_hop [--turns 40] [--tokens 64]

With `--bare` only the way there and back is measured, both of its ends in this process and no engine behind it: CPU
seconds, which other work on the machine does not change much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import uvicorn

from phi_cluster.cluster.peer_door import PeerDoor
from phi_cluster.cluster.peer_link import PeerLinks
from phi_cluster.cluster.peer_proof import ClusterKey, Guard
from phi_cluster.cluster.peers import PeerReplica
from phi_cluster.cluster.turn_api import Position, TextDelta, TurnFinished, TurnRequest, TurnStarted
from phi_cluster.cluster.turn_wire import SentTurn
from tests.cluster.two_nodes import TwoNodes
from tests.redis_process import RedisProcess

HOWS = (("second", "direct"), ("head", "forwarded"))
_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Of a process, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def turn(client: httpx.Client, question: str, num_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and for each of the others."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    begin, times = time.perf_counter(), []
    with client.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": "hop"}) as response:
        assert response.status_code == 200, response.read()
        times += [time.perf_counter() for line in response.iter_lines() if '"content"' in line]
    return times[0] - begin, (times[-1] - times[0]) / (num_tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()
    if options.bare:
        asyncio.run(bare(options))
        return
    with tempfile.TemporaryDirectory(prefix="phi-hop-") as folder:
        redis = RedisProcess(Path(folder))
        nodes = TwoNodes(redis.url, Path(folder) / "state")
        try:
            measure(nodes, options)
        finally:
            nodes.close()
            redis.kill()


class Told:
    """Says so many tokens, each when the one before it has gone."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    async def run(self, request):
        yield TurnStarted(100, 90)
        for number in range(1, self.num_tokens + 1):
            await asyncio.sleep(0)
            yield TextDelta(" word", 1, Position(number, number), (" word",))
        yield TurnFinished("stop", 100, 90, self.num_tokens)


async def bare(options: argparse.Namespace) -> None:
    key, told = ClusterKey("token", "1"), Told(0)
    links = PeerLinks(key)
    door = PeerDoor(lambda *_: None, Guard(key, "peer"), told, None)
    server = uvicorn.Server(uvicorn.Config(door, port=0, log_level="error", lifespan="off", ws="none"))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:  # noqa: ASYNC110 -- it says nothing
        await asyncio.sleep(0.01)
    peer = PeerReplica("peer", "n", f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", 0, 8)
    messages = [{"role": "user", "content": "word " * 400}]
    request = TurnRequest("t", "s", "r", {"temperature": 0, "max_tokens": 64, "seed": None}, messages=messages)
    found = {}
    for num_tokens in (0, 1000):
        told.num_tokens = num_tokens
        for number in range(options.turns + 5):
            if number == 5:
                cpu, wall = time.process_time(), time.perf_counter()
            async for _ in links.run(peer, SentTurn(request)):
                pass
        spent = (time.process_time() - cpu, time.perf_counter() - wall)
        found[num_tokens] = [value / options.turns * 1000 for value in spent]
    each = [(more - less) / 1000 for less, more in zip(found[0], found[1000], strict=True)]
    print(
        json.dumps(
            {
                "a_turn_ms": {"cpu": round(found[0][0], 2), "wall": round(found[0][1], 2)},
                "a_token_ms": {"cpu": round(each[0], 4), "wall": round(each[1], 4)},
            },
            indent=2,
        )
    )
    await links.close()
    server.should_exit = server.force_exit = True
    await serving


def measure(nodes: TwoNodes, options: argparse.Namespace) -> None:
    clients = {name: nodes.client(name) for name in ("second", "head")}
    pids = [nodes.replica_pid(name) for name in ("head", "second")]
    for name in ("second", "head", "second", "head"):
        turn(clients[name], "Warm up.", options.tokens)
    found: dict[str, list[tuple[float, float]]] = {"second": [], "head": []}
    cpu = dict.fromkeys(found, 0.0)
    for number in range(options.turns):
        for name in found if number % 2 else reversed(found):
            before = sum(map(cpu_seconds, pids))
            found[name].append(turn(clients[name], f"Say something of the number {number}.", options.tokens))
            cpu[name] += sum(map(cpu_seconds, pids)) - before
    assert nodes.node_of("hop") == "second"
    told: dict[str, dict[str, float]] = {}
    for name, how in HOWS:
        first, each = (statistics.median(values) * 1000 for values in zip(*found[name], strict=True))
        told[how] = {"first_token_ms": round(first, 2), "token_ms": round(each, 3)}
    num_tokens = options.turns * options.tokens
    told["cpu_ms_a_token"] = {how: round(cpu[name] / num_tokens * 1000, 3) for name, how in HOWS}
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
