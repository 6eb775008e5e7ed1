"""A real server that grows under load and shrinks again, without cutting a stream or forgetting a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

REPLICA = "ray::ServeReplica"


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], make_client: Callable[[Any], Any]) -> Iterator[Any]:
    config = {
        "engine": {"num_threads": 1, "standby_engines": 0},
        "server": {"drain": "2s"},
        "autoscaling": {"max_replicas": 2, "target_turns": 2, "up_delay": "500ms", "down_delay": "1s"},
    }
    server = launch(config)
    yield server
    # A replica may be drained for an hour, but the end of the server does not wait for that.
    client = make_client(server)
    with client.conversation(None).stream("Tell a story.", max_tokens=8000, ignore_eos=True) as stream:
        stream.read(1)
        server.stop()
    client.close()


def test_one_two_one_under_streams(server: Any, client: Any, until: Callable[..., Any]) -> None:
    def replicas() -> list[Any]:
        return server.processes(REPLICA)

    [first] = replicas()
    named = client.conversation("stays")
    named.say("My name is Odalys.")

    def count(session_id: str | None) -> str:
        fields: dict[str, Any] = {"max_tokens": 250, "ignore_eos": True, "temperature": 0}
        return client.conversation(session_id).say("Count to nine.", **fields).text

    expected = count("alone")

    with ThreadPoolExecutor(6) as pool:
        many = [pool.submit(count, None) for _ in range(6)]
        until(lambda: len(replicas()) == 2, "a second replica", 60)
        [second] = [process for process in replicas() if process.pid != first.pid]
        assert [future.result() for future in many] == [expected] * 6
        # One of them is drained while it streams: its process ends when its stream has.
        with client.conversation("left").stream("Tell a story.", max_tokens=800, ignore_eos=True) as left:
            left.read(3)
            with client.conversation("right").stream("Tell a story.", max_tokens=800, ignore_eos=True) as right:
                right.read(3)
                until(lambda: len(replicas()) == 1, "one replica", 90)
                assert left.finish().finish_reason == "length"
                assert right.finish().finish_reason == "length"
    [last] = replicas()
    assert last.pid in (first.pid, second.pid)
    # Whichever it is: the memory is the session's.
    assert named.say("What is my name?").cached > 15
