"""Session actors are renewed and put away by policy, unasked; conversations and their caches do not notice.

And two of them that take turns never see each other, in any place where bytes could be.
"""

from __future__ import annotations

import secrets
from array import array

import pytest

from tests.cluster.stored_bytes import read_data

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CONFIG = {
    # Rounding must not decide where replies are compared.
    "dtype": "float32",
    "sessions": {"max_age": "2s", "idle_timeout": "8s", "spawn_interval": "100ms", "warm_actors": 2},
    "recycler": {"interval": "250ms"},
}


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    server.stop()


QUESTIONS = [f"What is {number} plus {number}?" for number in range(1, 21)]


def test_twenty_turns_of_an_ageing_session(client, until):
    """At least 5 recycles, no failure, the cache warm throughout, and the replies of one that is never recycled."""
    # Unnamed conversations have no actor, so nothing of theirs is ever recycled.
    young, never = client.conversation("ageing"), client.conversation(None)
    young.say(QUESTIONS[0], max_tokens=8)
    client.with_actor("ageing")
    pids = {client.session("ageing")["actor_pid"]}
    for number, question in enumerate(QUESTIONS[1:], start=1):
        # Turns spread over five lives and more.
        until(lambda least=number // 3: client.session("ageing")["recycles"] >= least, f"recycle {number // 3}", 30)
        pids.add(client.session("ageing")["actor_pid"])
        young.say(question, max_tokens=8)
        assert young.last.cached >= young.replies[-2].prompt + young.replies[-2].completion - 1
    for question in QUESTIONS:
        never.say(question, max_tokens=8)
    assert [reply.text for reply in young.replies] == [reply.text for reply in never.replies]

    described = client.session("ageing")
    assert described["turns"] == 20
    assert described["recycles"] >= 5
    assert described["activation"] >= described["recycles"]
    assert len(pids - {None}) >= 4
    until(
        lambda: client.metric("phi_session_recycles_total", reason="max_age") >= described["recycles"],
        "the metric to count them",
    )


def test_the_metric_counts_what_the_sessions_count(client, until):
    def agree() -> bool:
        counted = client.metric("phi_session_recycles_total", reason="max_age")
        described = sum(one["recycles"] for one in client.sessions().values())
        return counted == described == client.metric("phi_session_recycles_total", reason="max_age")

    client.conversation("counted").say("Hi", max_tokens=2)
    client.with_actor("counted")
    until(lambda: client.session("counted")["recycles"] >= 1, "a recycle")
    until(agree, "metric and sessions agree")


def test_an_idle_session_gives_its_actor_back_and_keeps_its_cache(client, until):
    talk = client.conversation("idle")
    talk.say("My name is Odalys.", max_tokens=8)
    described = client.with_actor("idle")
    held = until(lambda: one if (one := client.session("idle"))["holder"] == "keeper" else None, "its rest", 40)
    assert (held["state"], held["actor_pid"], held["process_bytes"]) == ("held", None, 0)
    assert held["kv_cache_bytes"] == described["kv_cache_bytes"]
    assert held["idle_seconds"] >= 8
    until(lambda: client.metric("phi_session_recycles_total", reason="idle") >= 1, "the metric to count it")
    # It stays put: nobody spends a process on it before its next turn.
    rests = client.session("idle")["activation"]
    until(lambda: client.session("idle")["idle_seconds"] >= held["idle_seconds"] + 4, "four more seconds", 20)
    assert (client.session("idle")["holder"], client.session("idle")["activation"]) == ("keeper", rests)
    reply = talk.say("What is my name?", max_tokens=8)
    assert reply.cached >= talk.replies[0].prompt + talk.replies[0].completion - 1
    client.with_actor("idle")


def test_canaries_are_never_seen_elsewhere(client, server, tokenizer, until):
    """Two sessions take turns, through recycles; each one's secret is searched for wherever the other's bytes are."""
    secret = {name: "".join(secrets.choice("123456789") for _ in range(32)) for name in ("left", "right")}
    ids = {name: array("i", tokenizer.encode(digits)).tobytes() for name, digits in secret.items()}
    talks = {name: client.conversation(name) for name in secret}
    outputs: dict[str, list[str]] = {name: [] for name in secret}
    stats: list[str] = []
    for turn in range(5):
        for name, talk in talks.items():
            said = f"Turn {turn}. My secret number is {secret[name]}. Repeat it." if turn % 2 == 0 else "Go on."
            outputs[name].append(talk.say(said, max_tokens=16).text)
            stats.append(client.http.get("/v1/sessions").text)
        until(lambda least=turn // 2: client.session("left")["recycles"] >= least, f"recycle {turn // 2}", 30)

    for name, other in (("left", "right"), ("right", "left")):
        segment = read_data(client.segment(name))
        # The search would find it: the session's own is there.
        assert ids[name] in segment
        assert ids[other] not in segment
        assert secret[other].encode() not in segment
        assert secret[other] not in "".join(outputs[name])

    places = [*stats, client.metrics_text(), server.output]
    logs = [path for path in server.runtime_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("raylet" in path.name for path in logs)
    for digits in secret.values():
        assert not [place[:80] for place in places if digits in place]
        assert not [path for path in logs if digits.encode() in path.read_bytes()]
        assert not [process for process in server.processes() if digits in process.name]
