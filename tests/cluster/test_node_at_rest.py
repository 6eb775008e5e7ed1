"""Two machines, of which one has a replica only while there is much to do: in between it gives back what would hold
it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.machines import Cluster, serving

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SETTINGS = {
    "replicas": 1,
    "autoscaling": {"max_replicas": 2, "target_turns": 1, "up_delay": "200ms", "down_delay": "3s"},
    "nodes": {"idle_timeout": "8s"},
    "engine": {"num_threads": 1, "standby_engines": 0},
    "kv": {"budget": "300MB"},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, until: Callable[..., Any]) -> Iterator[Cluster]:
    with serving(tmp_path_factory.mktemp("c"), 2, until, SETTINGS) as cluster:
        yield cluster


def test_a_machine_without_a_replica_rests_and_wakes_with_the_next_one(
    cluster: Cluster, until: Callable[..., Any]
) -> None:
    [other] = cluster.others
    other.start("Joined")

    def keepers() -> list[int]:
        return [pid for pid, command in other.host.commands().items() if command.startswith("ray::Keeper")]

    def say(name: str, tokens: int) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        with cluster.http(cluster.head) as http:
            answer = http.post("/v1/chat/completions", json=body, headers={"x-session-id": name}, timeout=300)
            assert answer.status_code == 200, answer.text
            told: dict[str, Any] = answer.json()
            return told

    until(lambda: not keepers(), "the end of a keeper that nobody needs", 120)
    assert cluster.num_serving() == 1
    is_enough = threading.Event()

    def serves_too() -> bool:
        # Asking is work, too.
        time.sleep(2)
        return cluster.num_serving() == 2

    def talk(number: int) -> set[str]:
        """The same question in new sessions, as long as it takes; what was answered."""
        heard = set()
        while not is_enough.is_set():
            name = f"{number}-{len(names)}"
            heard.add(say(name, 600)["choices"][0]["message"]["content"])
            names.append(name)
        return heard

    names: list[str] = []
    with ThreadPoolExecutor(6) as pool:
        many = [pool.submit(talk, number) for number in range(6)]
        try:
            until(serves_too, "a replica on the other machine", 240)
            assert keepers()
        finally:
            is_enough.set()
        texts = set().union(*(one.result() for one in many))
    assert len(texts) == 1
    until(lambda: not keepers(), "rest", 240)
    # What was said there goes on: moved, or computed from its journal.
    for name in names[-6:]:
        assert say(name, 4)["usage"]["completion_tokens"] == 4
    other.leave()
