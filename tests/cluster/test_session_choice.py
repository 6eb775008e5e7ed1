"""A real server with two replicas: a session's turns reach the same one, and without a name they go round."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(launch):
    server = launch({"replicas": 2, "server": {"first_choice": "session"}, "engine": {"standby_engines": 0}})
    yield server
    server.stop()


def test_a_session_is_served_by_the_replica_that_its_name_stands_for(server, make_client, until):
    client = make_client(server)

    def engine(name, **headers):
        """Of the replica that answers."""
        return client.http.get(f"/v1/sessions/{name}", headers=headers).json()["engine_pid"]

    names = [f"s{number}" for number in range(12)]
    for name in names:
        client.conversation(name).say("Hello.", max_tokens=2)
    # The proxy knows both some moments after they are up.
    until(lambda: len({engine(names[0]) for _ in range(8)}) == 2, "both replicas to be asked", 60)
    chosen = {name: {engine(name, **{"x-session-id": name}) for _ in range(4)} for name in names}
    assert all(len(engines) == 1 for engines in chosen.values())
    assert len(set.union(*chosen.values())) == 2
    client.close()
