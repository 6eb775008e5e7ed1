"""Two nodes of one cluster: whichever a request comes to, it is as if there were one, and one that is lost takes no
word with it."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

from tests.cluster.conftest import Conversation
from tests.cluster.two_nodes import TwoNodes
from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

QUESTIONS = ("My name is Odalys. Name three rivers.", "Which one is the longest?", "What is my name?")
HOW = {"temperature": 0.8, "seed": 5, "max_tokens": 24}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    redis = RedisProcess(folder)
    try:
        nodes = TwoNodes(redis.url, folder / "state")
        yield nodes
        nodes.close()
    finally:
        redis.kill()


@pytest.fixture
def ask(nodes):
    """Clients of both nodes' replicas."""
    clients = {name: nodes.client(name) for name in ("head", "second")}
    yield clients
    for one in clients.values():
        one.close()


def resumed(http, other):
    """The same conversation, at another node."""
    conversation = Conversation(http, other.session_id)
    conversation.messages, conversation.replies = list(other.messages), list(other.replies)
    return conversation


def test_a_conversation_is_warm_whichever_node_it_comes_to(nodes, ask):
    alone = Conversation(ask["second"], "alone")
    for question in QUESTIONS:
        alone.say(question, **HOW)
    talk = Conversation(ask["second"], "wanderer")
    for question, node in zip(QUESTIONS, ("second", "head", "second"), strict=True):
        talk = resumed(ask[node], talk)
        talk.say(question, **HOW)
    assert [one.text for one in talk.replies] == [one.text for one in alone.replies]
    for before, after in zip(talk.replies, talk.replies[1:], strict=False):
        assert after.cached >= before.prompt + before.completion - 1
    assert nodes.node_of("wanderer") == "second"
    assert ask["head"].get("/v1/sessions/wanderer").json()["turns"] == 3


def test_an_unnamed_conversation_finds_its_cache(ask):
    for number in range(4):
        talk = Conversation(ask["head"], None)
        talk.say(f"Tell me of the number {number}.", max_tokens=8)
        talk = resumed(ask["second"], talk)
        before = talk.last
        assert talk.say("More.", max_tokens=8).cached >= before.prompt + before.completion - 1


def test_a_stream_comes_word_by_word_through_another_node(nodes, ask):
    Conversation(ask["second"], "streamed").say("Hello.", max_tokens=2)
    with Conversation(ask["head"], "streamed").stream("Count to twenty.", max_tokens=24, ignore_eos=True) as stream:
        stream.finish()
    assert len(stream.pieces) >= 12
    assert stream.times[-1] - stream.times[0] > 0.05
    assert nodes.node_of("streamed") == "second"


def test_a_client_that_leaves_ends_its_turn_on_the_other_node(nodes, ask):
    Conversation(ask["second"], "left").say("Hello.", max_tokens=2)
    with Conversation(ask["head"], "left").stream("Count.", max_tokens=2000, ignore_eos=True) as stream:
        stream.read(4)
    # Its session is free again long before it would have been.
    begin = time.monotonic()
    reply = Conversation(ask["second"], "left").say("Hello again.", max_tokens=2)
    assert reply.completion == 2
    assert time.monotonic() - begin < 20


def test_errors_and_several_replies_come_through(ask):
    Conversation(ask["second"], "several").say("Hello.", max_tokens=2)
    body = {"messages": [{"role": "user", "content": "Hello."}], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 3}
    told = [
        ask[node].post("/v1/chat/completions", json=body, headers={"x-session-id": "several"}).json()
        for node in ("second", "head")
    ]
    assert [one["message"] for one in told[0]["choices"]] == [one["message"] for one in told[1]["choices"]]
    long = {**body, "messages": [{"role": "user", "content": "x " * 9000}], "n": 1}
    for node in ("second", "head"):
        refused = ask[node].post("/v1/chat/completions", json=long, headers={"x-session-id": "several"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_sessions_are_looked_after_from_everywhere(nodes, ask):
    Conversation(ask["second"], "kept").say("Hello.", max_tokens=2)
    Conversation(ask["head"], "here").say("Hello.", max_tokens=2)
    lists = [ask[node].get("/v1/sessions", params={"limit": 100}).json() for node in ("head", "second")]
    ids = [[one["id"] for one in told["data"]] for told in lists]
    assert ids[0] == ids[1]
    assert len(ids[0]) == len(set(ids[0])) == lists[0]["totals"]["sessions"]
    assert ask["head"].get("/v1/sessions/kept/messages").json()["data"][0]["content"]
    assert ask["head"].post("/v1/sessions/kept/fork", json={"id": "twin"}).json()["node_id"] == nodes.node_ids["second"]
    assert ask["head"].delete("/v1/sessions/kept").status_code == 200
    for node in ("second", "head"):
        assert ask[node].get("/v1/sessions/kept").status_code == 404


def test_stored_responses_are_found_through_every_node(ask):
    asked = {"input": "My name is Odalys.", "max_output_tokens": 8}
    first = ask["second"].post("/v1/responses", json=asked)
    assert first.headers["x-request-id"] == first.json()["id"].removeprefix("resp_")
    for node in ("second", "head"):
        assert ask[node].get(f"/v1/responses/{first.json()['id']}").json() == first.json()
    more = {"input": "And?", "max_output_tokens": 8, "previous_response_id": first.json()["id"], "stream": True}
    with ask["second"].stream("POST", "/v1/responses", json=more) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("event:")]
    assert events[0] == "event: response.created"
    assert events[-1] in ("event: response.completed", "event: response.incomplete")
    talk = ask["second"].post("/v1/conversations", json={"metadata": {"a": "b"}}).json()
    assert ask["head"].get(f"/v1/conversations/{talk['id']}").json() == talk
    assert ask["second"].delete(f"/v1/conversations/{talk['id']}").status_code == 200
    assert ask["head"].get(f"/v1/conversations/{talk['id']}").status_code == 404
    assert ask["second"].post("/v1/responses", content=b"{").status_code == 400


def test_strangers_find_no_internal_path(ask):
    for headers in ({}, {"x-phi-peer": "1 2 3 4"}):
        answer = ask["second"].post("/internal/turns", content=b"x", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert not [path for path in ask["head"].get("/openapi.json").json()["paths"] if "internal" in path]


def test_a_node_that_is_lost_takes_no_word_with_it(nodes, ask):
    """In mid-stream, through the other node: its client does not notice but for a pause."""
    twin = Conversation(ask["head"], "twin")
    for question in QUESTIONS[:2]:
        twin.say(question, **HOW, ignore_eos=True)
    talk = Conversation(ask["second"], "lost")
    talk.say(QUESTIONS[0], **HOW, ignore_eos=True)
    assert nodes.node_of("lost") == "second"
    talk = resumed(ask["head"], talk)
    with talk.stream(QUESTIONS[1], **HOW, ignore_eos=True) as stream:
        stream.read(4)
        killing = threading.Thread(target=nodes.kill_second)
        killing.start()
        stream.finish()
        killing.join()
    assert "".join(stream.pieces) == twin.replies[1].text
    assert talk.say(QUESTIONS[2], **HOW).prompt
    assert nodes.node_of("lost") == "head"
    told = ask["head"].get("/v1/sessions", params={"limit": 100}).json()
    assert {one["node_id"] for one in told["data"]} <= {nodes.node_ids["head"], None}
    assert Conversation(ask["head"], "alone").say("Hello.", max_tokens=2).completion == 2
    with pytest.raises(httpx.TransportError):
        ask["second"].get("/health")
