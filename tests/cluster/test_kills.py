"""kill -9 of every kind of process: conversations go on, and from the same cache where it lives elsewhere.

One server and one conversation per victim; a twin that nothing happens to says what the right answers are.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CONFIG = {
    # Rounding must not decide between a computed and a stored row.
    "dtype": "float32",
    # One engine, and another one only when that is dead; test_failover.py is about those that stand by.
    "engine": {"standby_engines": 0},
    "sessions": {"spawn_interval": "100ms"},
}
FIRST = "My name is Odalys and I live in Lima. What is the capital of France?"
SECOND = "What is my name?"
THIRD = "Where do I live?"


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    if server.main.lives:
        server.stop()


@pytest.fixture(scope="module")
def twin(client):
    """The conversation that nothing happens to."""
    twin = client.conversation("twin")
    for question in (FIRST, SECOND, THIRD):
        twin.say(question, max_tokens=24)
    return twin


def begin(client, name):
    """A conversation of one turn that an actor holds."""
    talk = client.conversation(name)
    talk.say(FIRST, max_tokens=24)
    client.with_actor(name)
    return talk


def go_on(client, talk, twin, *, warm=True):
    """The second and third turn are served, and are what the twin said; `warm`: the second from the cache."""
    for number, question in enumerate((SECOND, THIRD), start=1):
        before, reply = talk.last, client.patient(talk, question, max_tokens=24)
        assert reply.text == twin.replies[number].text
        assert reply.prompt == twin.replies[number].prompt
        if warm or number > 1:
            assert reply.cached >= before.prompt + before.completion - 1
    assert client.session(talk.session_id)["turns"] == 3


def engine_of(client, name):
    return client.session(name)["engine_pid"]


def test_the_engine_between_turns(client, server, twin):
    talk = begin(client, "engine")
    victim = server.process("ray::EngineActor")
    assert engine_of(client, "engine") == victim.pid
    before = client.session("engine")
    victim.kill()
    go_on(client, talk, twin)
    assert talk.replies[1].details["engine_replaced"] is True
    assert talk.replies[2].details["engine_replaced"] is False
    after = client.session("engine")
    assert after["engine_pid"] not in (None, victim.pid)
    assert (after["actor_pid"], after["activation"]) == (before["actor_pid"], before["activation"])


def test_the_engine_in_mid_stream(client, server, until):
    """Four replies go on where they stopped, on the next engine, and are what they would have been."""
    questions = [f"Tell me a story about {what}." for what in ("a fox", "the number 7", "rain", "Lima")]
    ask = {"max_tokens": 40, "ignore_eos": True}
    undisturbed = [client.conversation(None).say(question, **ask) for question in questions]
    recoveries = client.metric("phi_recoveries_total", component="engine")
    talks = [client.conversation(f"story-{number}") for number in range(4)]
    started: list[object] = []

    def run(number: int) -> Any:
        with talks[number].stream(questions[number], **ask) as stream:
            started.append(stream.read(3))
            return stream.finish()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run, number) for number in range(4)]
        until(lambda: len(started) == 4, "four streams")
        assert not any(one.done() for one in running)
        server.process("ray::EngineActor").kill()
        replies = [one.result(120) for one in running]
    assert [reply.text for reply in replies] == [reply.text for reply in undisturbed]
    assert {reply.completion for reply in replies} == {40}
    again = talks[0].say("And then?", max_tokens=4)
    assert again.cached >= replies[0].prompt + replies[0].completion - 1
    until(
        lambda: client.metric("phi_recoveries_total", component="engine") == recoveries + 1,
        "the recovery to be counted",
    )


def test_the_replica(client, server, twin, until):
    """Between two turns of one session, and in the middle of a turn of another."""
    talk, torn = begin(client, "replica"), begin(client, "torn")
    before = client.session("replica")
    victims = [server.process("ray::ServeReplica"), server.process("ray::EngineActor")]
    with torn.stream("Tell me a long story.", max_tokens=1000, ignore_eos=True) as stream:
        stream.read(3)
        victims[0].kill()
    # Its engine must not go on writing on its own.
    until(lambda: not victims[1].lives, "the end of the replica's engine", 10)
    go_on(client, talk, twin)
    after = client.session("replica")
    assert (after["actor_pid"], after["activation"]) == (before["actor_pid"], before["activation"])
    # Nobody can commit the torn turn any more: the session is free, with what was committed before.
    go_on(client, torn, twin)
    assert server.is_ready()


@pytest.mark.parametrize("name", ["read-on", None])
def test_a_reply_is_read_on_after_the_death_of_its_replica(client, server, until, name):
    """By a named session and by an unnamed one: with the same text, and without computing again what was there."""
    fields = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.9}
    question = "Tell me a long story about a lighthouse."
    talk = client.conversation(name)
    if name is not None:
        talk.say("Hello.", max_tokens=4)
        client.with_actor(name)
    with talk.stream(question, **fields) as torn:
        torn.read(20)
        server.process("ray::ServeReplica").kill()
        with pytest.raises(httpx.TransportError):
            torn.finish()
    until(server.is_ready, "the next replica", 60)
    with talk.read_on(torn) as rest:
        reply = rest.finish()
    text = "".join(torn.pieces) + reply.text
    assert (reply.completion, reply.finish_reason) == (60, "length")
    # The whole of it, once more: it is there. A seed was chosen for it, so nothing else would come out the same.
    torn.position = "0"
    talk.edit(len(talk.messages) - 2)
    with talk.read_on(torn) as again:
        whole = again.finish()
    assert whole.text == text
    assert whole.completion == 60
    # The conversation goes on from it.
    assert talk.say("And then?", max_tokens=4).cached >= whole.prompt + 59


def test_a_client_that_left_reads_on(client):
    fields = {"max_tokens": 60, "ignore_eos": True}
    undisturbed = client.conversation("left-twin").say("Describe the sea.", **fields)
    talk = client.conversation("left")
    with talk.stream("Describe the sea.", **fields) as torn:
        torn.read(10)
    with talk.read_on(torn) as rest:
        assert "".join(torn.pieces) + rest.finish().text == undisturbed.text


def test_the_session_actor_between_turns(client, server, twin):
    talk = begin(client, "actor")
    victim = actor_of(client, server, "actor")
    victim.kill()
    # Its memory outlives it.
    go_on(client, talk, twin)
    assert client.with_actor("actor")["actor_pid"] != victim.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_session_actor_in_mid_stream(client, server, twin, number):
    """Also one that hangs: it is ended, and nobody waits for it for long."""
    talk = begin(client, f"actor-{number.name}")
    victim = actor_of(client, server, talk.session_id)
    with talk.stream(SECOND, max_tokens=24) as stream:
        stream.read(2)
        os.kill(victim.pid, number)
        reply = stream.finish()
    assert reply.text == twin.replies[1].text
    assert client.session(talk.session_id)["turns"] == 2
    third = talk.say(THIRD, max_tokens=24)
    assert third.text == twin.replies[2].text
    assert third.cached >= reply.prompt + reply.completion - 1
    assert not victim.lives
    if number == signal.SIGSTOP:
        assert client.metric("phi_session_recycles_total", reason="unresponsive") >= 1


def actor_of(client, server, name):
    return {p.pid: p for p in server.processes("ray::SessionActor")}[client.with_actor(name)["actor_pid"]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_keeper(client, server, twin, until, number):
    """Also one that hangs: the controller ends it."""
    name = f"keeper-{number.name}"
    talk, held = begin(client, name), client.conversation(f"{name}-held")
    before = {name: one["turns"] for name, one in client.sessions().items()}
    actor_pid = client.session(name)["actor_pid"]
    victim = server.process("ray::Keeper")
    # This session is too new to have an actor of its own for sure: held by the keeper or not, it must come back.
    held.say(FIRST, max_tokens=24)
    os.kill(victim.pid, number)
    go_on(client, talk, twin)
    go_on(client, held, twin, warm=False)
    assert server.process("ray::Keeper").pid != victim.pid
    after = {name: one["turns"] for name, one in client.sessions().items()}
    assert after == before | {name: 3, f"{name}-held": 3}
    assert client.session(name)["actor_pid"] == actor_pid
    # New sessions get actors again.
    client.conversation(f"after-{name}").say("Hi", max_tokens=2)
    client.with_actor(f"after-{name}")
    until(lambda: client.metric("phi_sessions", state="active") >= 2, "the gauges to be back")


def test_the_controller_and_the_weight_store(client, server, twin, until):
    """Nobody needs them for a turn. What they know is collected, or published, again."""
    talk = begin(client, "controller")
    victims = [server.process("ray::Controller"), server.process("ray::WeightStore")]
    for victim in victims:
        victim.kill()
    go_on(client, talk, twin)
    # Counters of replicas that live go on; only those of earlier replicas died with the controller.
    tokens = sum(reply.completion for reply in talk.replies)
    until(lambda: client.metric("phi_generation_tokens_total") >= tokens, "the counters to be back")
    until(lambda: client.metric("phi_sessions", state="active") >= 1, "the gauges to be back")
    assert server.process("ray::Controller").pid != victims[0].pid
    # The next engine needs the weights.
    server.process("ray::EngineActor").kill()
    before = talk.last
    assert client.patient(talk, "Thank you.", max_tokens=4).cached >= before.prompt + before.completion - 1


def test_serves_controller(client, server, twin, until):
    """Nobody needs it for a turn, running or new."""
    talk = begin(client, "serve-controller")
    victim = server.process("ray::ServeController")
    with client.conversation("beside").stream("Tell me a story.", max_tokens=60, ignore_eos=True) as stream:
        stream.read(3)
        victim.kill()
        go_on(client, talk, twin)
        assert stream.finish().completion == 60
    until(lambda: server.processes("ray::ServeController"), "the next one", 60)


def test_haproxy(client, server, twin, until):
    """Its connections break; new ones are served again after some seconds, and a broken reply is read on."""
    talk, torn = begin(client, "haproxy"), client.conversation("haproxy-torn")
    with torn.stream("Tell me a story.", max_tokens=60, ignore_eos=True) as stream:
        stream.read(3)
        victims = [process for process in server.processes() if "haproxy -" in process.name]
        assert victims
        for victim in victims:
            victim.kill()
        with pytest.raises(httpx.TransportError):
            stream.finish()
    go_on(client, talk, twin)
    with torn.read_on(stream) as rest:
        assert rest.finish().completion == 60
    assert not any(victim.lives for victim in victims)


def test_everything_at_once(launch, server, client, make_client, twin):
    """Committed turns outlive all processes; the next start ends the HAProxy that still listens. Runs last."""
    talks = [client.conversation(f"survivor-{number}") for number in range(3)]
    for talk in talks:
        talk.say(FIRST, max_tokens=24)
    committed = client.sessions()
    folder = server.runtime_dir
    [haproxy] = server.kill_all(spare="haproxy -")
    assert haproxy.lives

    second = launch(CONFIG, server.state_dir, like=server)
    assert not haproxy.lives
    assert not folder.exists()
    client = make_client(second)
    stored = {name: (one["turns"], one["num_tokens"], one["state"]) for name, one in client.sessions().items()}
    assert stored == {name: (one["turns"], one["num_tokens"], "stored") for name, one in committed.items()}
    for talk in talks:
        go_on(client, client.resumed(talk), twin, warm=False)
    client.close()
    second.stop(signal.SIGTERM)
