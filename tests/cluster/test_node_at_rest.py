"""Two machines, of which one has a replica only while there is much to do: in between it gives back what would hold
it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.hosts import Network, why_not
from tests.cluster.machines import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SETTINGS = {
    "replicas": 1,
    "autoscaling": {"max_replicas": 2, "target_turns": 1, "up_delay": "200ms", "down_delay": "3s"},
    "nodes": {"idle_timeout": "3s"},
    "engine": {"num_threads": 1, "standby_engines": 0},
    "kv": {"budget": "300MB"},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, until: Callable[..., Any]) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("c")
    network = Network(folder, 2)
    cluster = None
    try:
        cluster = Cluster(folder, network, until, SETTINGS)
        cluster.head.start("Ready in")
        yield cluster
        cluster.head.leave(signal.SIGINT)
    finally:
        network.close()
        if cluster is not None:
            cluster.close()


def test_a_machine_without_a_replica_rests_and_wakes_with_the_next_one(
    cluster: Cluster, until: Callable[..., Any]
) -> None:
    [other] = cluster.others
    other.start("Joined")

    def keepers() -> list[int]:
        return [pid for pid in other.host.pids() if _command(pid).startswith("ray::Keeper")]

    def say(number: int, tokens: int) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": tokens, "ignore_eos": True}
        with cluster.http(cluster.head) as http:
            answer = http.post("/v1/chat/completions", json=body, headers={"x-session-id": f"s{number}"}, timeout=300)
            assert answer.status_code == 200, answer.text
            told: dict[str, Any] = answer.json()
            return told

    until(lambda: not keepers(), "the end of a keeper that nobody needs", 120)
    assert cluster.num_serving() == 1
    with ThreadPoolExecutor(6) as pool:
        many = [pool.submit(say, number, 800) for number in range(6)]
        until(lambda: cluster.num_serving() == 2, "a replica on the other machine", 240)
        assert keepers()
        texts = {one.result()["choices"][0]["message"]["content"] for one in many}
    assert len(texts) == 1
    until(lambda: not keepers(), "rest", 240)
    # What was said there goes on: moved, or computed from its journal.
    for number in range(6):
        assert say(number, 4)["usage"]["completion_tokens"] == 4
    other.leave()


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
