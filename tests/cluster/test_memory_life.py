"""The life of a session's memory, over HTTP on a real server: forks, hibernation, deletion, export."""

from __future__ import annotations

import secrets
from array import array

import pytest

from tests.cluster.stored_bytes import digest_of, files_with, memory_file, read_data

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CONFIG = {"sessions": {"spawn_interval": "100ms", "hibernate_after": "10s"}, "recycler": {"interval": "250ms"}}
QUESTIONS = ("My name is Odalys. Name three rivers.", "Which one is the longest?", "What is my name?")
HOW = [{"temperature": 0.0, "max_tokens": 24}, {"temperature": 1.0, "seed": 11, "max_tokens": 24}]


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    server.stop()


def forked(client, talk, session_id, **fields):
    response = client.http.post(f"/v1/sessions/{talk.session_id}/fork", json={"id": session_id, **fields})
    assert response.status_code == 200, response.text
    fork = client.conversation(session_id)
    num_turns = fields.get("turn", len(talk.replies))
    fork.messages, fork.replies = talk.messages[: 2 * num_turns], talk.replies[:num_turns]
    return fork, response.json()


@pytest.mark.parametrize("place", ["keeper", "actor"])
def test_forks_and_their_source_say_what_an_undisturbed_session_says(client, place):
    talk, twin = client.conversation(f"source-{place}"), client.conversation(f"twin-{place}")
    for question in QUESTIONS[:2]:
        assert talk.say(question, **HOW[0]).text == twin.say(question, **HOW[0]).text
    if place == "actor":
        client.with_actor(talk.session_id)
    forks = []
    for number, how in enumerate(HOW):
        fork, described = forked(client, talk, f"fork-{place}-{number}")
        source = client.session(talk.session_id)
        # What is copied is exactly what is in use: the same bytes.
        assert described["kv_cache_bytes"] == source["kv_cache_bytes"]
        assert (described["num_tokens"], described["turns"]) == (source["num_tokens"], 2)
        forks.append((fork, how))
    earlier, described = forked(client, talk, f"fork-{place}-earlier", turn=1)
    assert described["turns"] == 1

    expected = {}
    for fork, how in forks:
        reply = fork.say(QUESTIONS[2], **how)
        assert reply.cached >= fork.replies[1].prompt + fork.replies[1].completion - 1
        expected[str(how)] = reply.text
    assert earlier.say(QUESTIONS[1], **HOW[0]).text == talk.replies[1].text
    assert earlier.last.cached >= talk.replies[0].prompt + talk.replies[0].completion - 1
    assert talk.say(QUESTIONS[2], **HOW[0]).text == twin.say(QUESTIONS[2], **HOW[0]).text == expected[str(HOW[0])]
    twin.edit(4)
    assert twin.say(QUESTIONS[2], **HOW[1]).text == expected[str(HOW[1])]


def test_a_forks_refusals(client, refused):
    talk = client.conversation("refusing")
    talk.say("Hi", max_tokens=2)
    for body, status, code in (
        ({"id": "refusing"}, 409, "session_exists"),
        ({"turn": 2}, 400, None),
        ({"id": "a b"}, 400, None),
    ):
        response = client.http.post("/v1/sessions/refusing/fork", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    made = client.http.post("/v1/sessions/refusing/fork").json()
    assert made["id"] in client.sessions()
    with talk.stream("Tell me something.", max_tokens=400, ignore_eos=True) as stream:
        stream.read(1)
    # Its client has left: the fork waits until that turn has ended.
    assert client.http.post("/v1/sessions/refusing/fork").status_code == 200


@pytest.mark.parametrize("place", ["keeper", "actor"])
def test_a_session_sleeps_and_goes_on_warm(client, server, place):
    talk, twin = client.conversation(f"sleeper-{place}"), client.conversation(f"waking-twin-{place}")
    for question in QUESTIONS[:2]:
        assert talk.say(question, **HOW[0]).text == twin.say(question, **HOW[0]).text
    if place == "actor":
        client.with_actor(talk.session_id)
    held = client.session(talk.session_id)
    asleep = client.http.post(f"/v1/sessions/{talk.session_id}/hibernate").json()
    assert (asleep["state"], asleep["kv_cache_bytes"], asleep["actor_pid"]) == ("hibernated", 0, None)
    # About what it took in memory, in whole pages there.
    assert 0.5 * held["kv_cache_bytes"] < asleep["disk_bytes"] < 1.1 * held["kv_cache_bytes"]
    assert asleep["num_tokens"] == held["num_tokens"]
    path = memory_file(server.state_dir, talk.session_id)
    assert path.stat().st_mode & 0o777 == 0o600
    reply = talk.say(QUESTIONS[2], **HOW[1])
    assert reply.cached >= talk.replies[1].prompt + talk.replies[1].completion - 1
    assert reply.text == twin.say(QUESTIONS[2], **HOW[1]).text
    assert not path.exists()


def test_a_damaged_file_changes_no_reply(client, server, until):
    talk, twin = client.conversation("damaged"), client.conversation("undamaged")
    for one in (talk, twin):
        one.say(QUESTIONS[0], **HOW[0])
    client.http.post("/v1/sessions/damaged/hibernate")
    path = memory_file(server.state_dir, "damaged")
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 4
    path.write_bytes(stored)
    reply = talk.say(QUESTIONS[1], **HOW[0])
    assert reply.cached == 0
    assert reply.text == twin.say(QUESTIONS[1], **HOW[0]).text
    until(lambda: client.metric("phi_session_hibernation_failures_total") == 1, "the metric to count it")


def test_policy_puts_idle_sessions_to_sleep(client, until):
    talk = client.conversation("idler")
    talk.say(QUESTIONS[0], max_tokens=300, ignore_eos=True)
    asleep = until(lambda: one if (one := client.session("idler"))["state"] == "hibernated" else None, "its sleep", 40)
    assert asleep["disk_bytes"] > 0
    until(lambda: client.metric("phi_sessions", state="hibernated") >= 1, "the gauge")
    assert client.metric("phi_hibernated_bytes") >= asleep["disk_bytes"]
    assert talk.say(QUESTIONS[1], max_tokens=4).cached > 300


@pytest.mark.parametrize("place", ["hibernated", "woken", "actor"])
def test_delete_leaves_no_byte(client, server, tokenizer, place):
    """A secret is looked for wherever bytes could be: in text and as ids, on the disk and in all live segments."""
    secret = "".join(secrets.choice("123456789") for _ in range(24))
    ids = array("i", tokenizer.encode(secret)).tobytes()

    def places() -> list[str]:
        found = files_with(server.state_dir, secret.encode(), ids)
        return found + [str(path) for path in client.segments().values() if ids in read_data(path)]

    talk = client.conversation(f"canary-{place}")
    talk.say(f"Remember {secret}.", max_tokens=8)
    other = client.conversation(f"neighbour-{place}")
    other.say("Good day.", max_tokens=8)
    if place == "actor":
        client.with_actor(talk.session_id)
    else:
        client.http.post(f"/v1/sessions/{talk.session_id}/hibernate")
        assert f"{digest_of(talk.session_id)}.kv" in places()
        if place == "woken":
            talk.say("Go on.", max_tokens=4)
    assert places()
    assert client.http.delete(f"/v1/sessions/{talk.session_id}").status_code == 200
    # An actor's process may take a moment to let go of its pages, which are empty by then.
    assert places() == []
    assert other.say("And a good night.", max_tokens=4).cached > 0


def test_what_is_exported_goes_on_as_if_it_had_never_left(client):
    talk = client.conversation("exported")
    for question in QUESTIONS[:2]:
        talk.say(question, **HOW[0])
    data = client.http.get("/v1/sessions/exported/export").content
    described = client.http.post("/v1/sessions/import?id=imported", content=data).json()
    assert (described["state"], described["turns"], described["num_tokens"]) == (
        "stored",
        2,
        client.session("exported")["num_tokens"],
    )
    copy = client.conversation("imported")
    copy.messages, copy.replies = list(talk.messages), list(talk.replies)
    assert copy.say(QUESTIONS[2], **HOW[0]).text == talk.say(QUESTIONS[2], **HOW[0]).text
    # The same with its cache: warm, with the same words.
    with_cache = client.http.get("/v1/sessions/exported/export?kv=true").content
    described = client.http.post("/v1/sessions/import?id=warm", content=with_cache).json()
    assert (described["state"], described["turns"]) == ("held", 3)
    warm = client.conversation("warm")
    warm.messages, warm.replies = list(talk.messages), list(talk.replies)
    last = talk.replies[-1]
    assert warm.say("Good.", **HOW[0]).text == talk.say("Good.", **HOW[0]).text
    assert warm.last.cached >= last.prompt + last.completion - 1
    # Damaged, it is left out.
    assert client.http.post("/v1/sessions/import?id=cold", content=with_cache[:-1]).json()["state"] == "stored"
    response = client.http.post("/v1/sessions/import?id=imported", content=data)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "session_exists")
    response = client.http.post("/v1/sessions/import", content=data[:-1])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_export")


def test_all_that_is_stored_is_private(server):
    for path in (server.state_dir / "sessions").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (server.state_dir / "sessions").stat().st_mode & 0o777 == 0o700
