"""Many sessions at once, and more than the KV memory holds: everybody is served, waits, or is told to come back."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TOKEN_NBYTES = 30 * 2 * 3 * 64 * 4
BUDGET = 2600 * TOKEN_NBYTES
CONFIG = {
    "dtype": "float32",
    "kv": {"budget": BUDGET, "reserve_wait": "8s"},
    "sessions": {"turn_wait": "60s"},
}


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    server.stop()


def test_a_burst_of_new_sessions(client, until):
    """64 sessions that nobody has seen before, at once: no one waits for a process of its own."""
    names = [f"burst-{number:02}" for number in range(64)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda name: client.conversation(name).say("Hi", max_tokens=2), names))
    assert {reply.completion for reply in replies} == {2}
    assert len({reply.text for reply in replies}) == 1
    described = client.sessions()
    assert {name: described[name]["turns"] for name in names} == dict.fromkeys(names, 1)
    # They started in the keeper's hands; actors follow one by one.
    until(lambda: client.metric("phi_sessions", state="active") >= 2, "actors to follow")
    assert client.metric("phi_sessions", state=("active", "held")) == 64
    assert sum(one["kv_cache_bytes"] for one in described.values()) <= BUDGET
    for name in names:
        assert client.http.delete(f"/v1/sessions/{name}").status_code == 200
    assert client.sessions() == {}
    until(lambda: client.metric("phi_kv_cache_bytes") == 0, "their memory to be back")


@contextlib.contextmanager
def full(client):
    """Four streams whose leases fill the budget: each covers its prompt and the next 512 tokens."""
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(
                client.conversation(f"full-{number}").stream("Tell me a story.", max_tokens=2000, ignore_eos=True)
            )
            for number in range(4)
        ]
        for stream in streams:
            stream.read(1)
        yield streams


def test_what_does_not_fit_waits_and_then_gets_429(client, refused, until):
    with full(client) as streams:
        begin = time.monotonic()
        with pytest.raises(refused) as overloaded:
            client.conversation("fifth").say("Hi", max_tokens=512)
        assert 7.9 < time.monotonic() - begin < 14
        assert overloaded.value.status == 429
        assert overloaded.value.error["code"] == "overloaded"
        assert int(overloaded.value.headers["retry-after"]) >= 1
        # Whoever needs little is served beside them, and they go on.
        assert client.conversation("small").say("Hi", max_tokens=2).completion == 2
        for stream in streams:
            stream.read(len(stream.pieces) + 1)
    until(lambda: client.metric("phi_num_requests_running") == 0, "quiet", 10)
    # Nothing is left of the refusal: the same turn fits now.
    assert client.conversation("fifth").say("Hi", max_tokens=512, stop=["."]).completion > 0


def test_who_waits_is_served_when_another_ends(client, until):
    with full(client) as streams, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.conversation("patient").say, "Hi", max_tokens=512, stop=["!", "."])
        until(lambda: client.metric("phi_num_requests_waiting") == 1, "it to wait", 3)
        assert not waiting.done()
        # A client that leaves gives its memory back.
        streams[0].__exit__(None, None, None)
        assert waiting.result(30).completion > 0
    until(lambda: client.metric("phi_num_requests_running") == 0, "quiet", 10)


def test_idle_sessions_make_room(client, until):
    """Caches of those who are longest idle leave memory; their conversations stay."""
    talks = [client.conversation(f"idle-{number}") for number in range(4)]
    for talk in talks:
        talk.say("word " * 650 + "What is the capital of France?", max_tokens=8)
    described = client.sessions()
    # The first must have gone for the last: all four are more than there is.
    assert sum(talk.last.prompt for talk in talks) * TOKEN_NBYTES > BUDGET
    held = [described[talk.session_id]["kv_cache_bytes"] for talk in talks]
    assert held[0] < TOKEN_NBYTES * 10
    assert held[3] >= talks[3].last.prompt * TOKEN_NBYTES
    assert sum(one["kv_cache_bytes"] for one in described.values()) <= BUDGET
    warm = talks[3].say("And of Italy?", max_tokens=8)
    assert warm.cached >= talks[3].replies[0].prompt + talks[3].replies[0].completion - 1
    # It went to the disk, and comes back from there.
    woken = talks[0].say("And of Italy?", max_tokens=8)
    assert woken.cached >= talks[0].replies[0].prompt + talks[0].replies[0].completion - 1
    assert (woken.text, woken.prompt) == (warm.text, warm.prompt)
    assert client.session("idle-0")["turns"] == 2
    until(lambda: client.metric("phi_kv_cache_usage_perc") <= 1, "the gauge within the budget")
    assert client.http.get("/ready").status_code == 200


def test_a_turn_larger_than_all_memory_is_refused_at_once(client, refused):
    begin = time.monotonic()
    with pytest.raises(refused) as overloaded:
        client.conversation("huge").say("word " * 3000, max_tokens=8)
    assert time.monotonic() - begin < 5
    assert overloaded.value.status == 429
    assert "bytes of KV cache" in overloaded.value.error["message"]
