"""A real server without replicas while nobody asks: it falls asleep, and the first request waits, but does not fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REPLICA = "ray::ServeReplica"


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any]) -> Iterator[Any]:
    server = launch(
        {
            "replicas": 0,
            "autoscaling": {"max_replicas": 1, "down_delay": "1s", "up_delay": "200ms"},
            "engine": {"num_threads": 1, "standby_engines": 0},
            "server": {"drain": "2s"},
        }
    )
    yield server
    server.stop()


@pytest.fixture
def asleep(server: Any, until: Callable[..., Any]) -> Callable[[], None]:
    """`asleep()` returns when there is no replica, and HAProxy knows it."""

    def wait() -> None:
        until(lambda: not server.processes(REPLICA), "no replica", 120)
        until(lambda: probe(server, "/ready") == {"status": "asleep"}, "asleep", 20)

    return wait


def probe(server: Any, path: str) -> dict[str, str]:
    answer = httpx.get(f"{server.url}{path}", timeout=5)
    assert answer.status_code == 200
    body: dict[str, str] = answer.json()
    return body


def test_a_session_goes_on_after_its_replica_has_slept(server: Any, client: Any, asleep: Callable[[], None]) -> None:
    named = client.conversation("stays")
    named.say("My name is Odalys.")
    asleep()
    assert probe(server, "/health") == {"status": "asleep"}
    # Being asked for its health, it sleeps on.
    for _ in range(20):
        assert probe(server, "/ready") == {"status": "asleep"}
        time.sleep(0.1)
    assert not server.processes(REPLICA)
    begin = time.monotonic()
    with named.stream("What is my name?", max_tokens=8) as stream:
        stream.read(1)
        print(f"asleep, to the first token: {time.monotonic() - begin:.1f} s")
        assert stream.finish().cached > 15
    assert probe(server, "/ready") == {"status": "ready"}


def test_who_comes_first_waits_and_nobody_fails(client: Any, asleep: Callable[[], None]) -> None:
    asleep()

    def ask(number: int) -> str:
        return client.conversation(f"of-{number}").say("Count to nine.", max_tokens=20, ignore_eos=True).text

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(ask, range(6)))
    assert len(set(texts)) == 1


def test_nobody_fails_who_comes_while_it_falls_asleep(server: Any, client: Any) -> None:
    """Requests with pauses about as long as it takes: some meet a replica that is being drained, some none."""
    expected = client.conversation(None).say("Say one word.", max_tokens=3).text
    for number in range(8):
        time.sleep(0.8 + 0.3 * number)
        assert client.conversation(f"again-{number}").say("Say one word.", max_tokens=3).text == expected


def test_a_response_in_the_background_keeps_the_replica(
    server: Any, until: Callable[..., Any], asleep: Callable[[], None]
) -> None:
    """Nobody asks while it is made; when it is, the replica goes, and the next one has it."""
    # One that is being drained would leave what it cannot end to the next one.
    asleep()
    body = {"input": "Tell a story.", "background": True, "max_output_tokens": 600, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=120) as http:
        made = http.post("/v1/responses", json=body).json()
        [replica] = server.processes(REPLICA)
        until(lambda: not replica.lives, "the replica's end", 180)
        done = http.get(f"/v1/responses/{made['id']}").json()
    # As long as it may be.
    assert (done["status"], done["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert done["usage"]["output_tokens"] == 600
