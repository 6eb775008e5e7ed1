"""OpenAI's own clients, unmodified, hold conversations with a real server: the Python one, and the Node one.

One server for all of it; what it goes through at the end (a killed replica, a restart) its clients do not notice but as
a broken connection.
"""

from __future__ import annotations

import contextlib
import json

import httpx
import openai
import pytest
from pydantic import BaseModel

pytestmark = [pytest.mark.clients, pytest.mark.cluster, pytest.mark.slow]

CONFIG = {"max_model_len": 1024, "engine": {"standby_engines": 0}, "sessions": {"spawn_interval": "100ms"}}
SHORT = {"temperature": 0, "max_output_tokens": 16}
# A reply that takes a while, and ends where everybody knows.
LONG = {
    **{"input": "Tell me a long story about a lighthouse.", "temperature": 0, "max_output_tokens": 300},
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    if server.main.lives:
        server.stop()


@pytest.fixture
def official(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="python", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="python") as client:
        return client.models.list().data[0].id


@pytest.fixture(scope="module")
def story(server, model):
    """What LONG gives, undisturbed."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="python", timeout=120) as client:
        return client.responses.create(model=model, **LONG).output_text


def session(server, name):
    """A session's description; None if there is none."""
    headers = {"authorization": "Bearer python"}
    response = httpx.get(f"{server.url}/v1/sessions/{name}", headers=headers, timeout=30)
    return response.json() if response.status_code == 200 else None


def cached(response):
    return response.usage.input_tokens_details.cached_tokens


def total(response):
    return response.usage.total_tokens


def test_a_chain_is_a_warm_session(official, server, model):
    last = first = official.responses.create(model=model, input="My name is Odalys.", **SHORT)
    for number, question in enumerate(("What is my name?", "And how many letters has it?", "Thank you."), start=2):
        response = official.responses.create(model=model, input=question, previous_response_id=last.id, **SHORT)
        assert cached(response) >= total(last) - 1
        assert cached(response) < response.usage.input_tokens
        last = response
        described = session(server, first.id)
        assert (described["turns"], described["num_tokens"]) == (number, total(last))
    assert official.responses.retrieve(last.id).output_text == last.output_text


def test_a_branch_goes_its_own_way(official, server, model):
    first = official.responses.create(model=model, input="My name is Odalys.", **SHORT)
    second = official.responses.create(
        model=model, input="I live in Lima. Where do I live?", previous_response_id=first.id, **SHORT
    )
    branch = official.responses.create(
        model=model, input="I live in Bergen. Where do I live?", previous_response_id=first.id, **SHORT
    )
    assert session(server, first.id)["turns"] == 2
    assert session(server, branch.id)["turns"] == 2
    # It has a copy of the memory up to where it leaves the other.
    assert total(first) - 1 <= cached(branch) < branch.usage.input_tokens
    for last in (second, branch):
        again = official.responses.create(model=model, input="Say it again.", previous_response_id=last.id, **SHORT)
        assert cached(again) >= total(last) - 1
    texts = [item.content[0].text for item in official.responses.input_items.list(branch.id)]
    assert texts == ["I live in Bergen. Where do I live?"]


def test_a_conversation_is_a_session(official, server, model):
    conversation = official.conversations.create(metadata={"topic": "names"})
    first = official.responses.create(model=model, input="My name is Odalys.", conversation=conversation.id, **SHORT)
    second = official.responses.create(model=model, input="What is it?", conversation=conversation.id, **SHORT)
    assert cached(second) >= total(first) - 1
    assert session(server, conversation.id)["turns"] == 2
    items = list(official.conversations.items.list(conversation.id, order="asc", limit=3))
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant"]
    assert [items[1].content[0].text, items[3].content[0].text] == [first.output_text, second.output_text]
    official.conversations.items.delete(items[0].id, conversation_id=conversation.id)
    assert session(server, conversation.id) is None
    official.responses.create(model=model, input="What was it?", conversation=conversation.id, **SHORT)
    assert official.conversations.delete(conversation.id).deleted
    assert session(server, conversation.id) is None
    with pytest.raises(openai.NotFoundError):
        official.conversations.items.list(conversation.id)


def test_events_come_one_by_one(official, model):
    with official.responses.stream(model=model, input="What is the capital of France?", temperature=0) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "Paris" in response.output_text
    assert sum(event.type == "response.output_text.delta" for event in events) > 3
    assert events[-1].type == "response.completed"


class City(BaseModel):
    name: str
    country: str


def test_a_reply_follows_a_schema(official, model):
    response = official.responses.parse(
        model=model, input="Lima is in Peru. Describe Lima.", text_format=City, temperature=0, max_output_tokens=100
    )
    assert isinstance(response.output_parsed, City)
    assert response.output_parsed.model_dump() == json.loads(response.output_text)


def test_instructions_are_for_one_response(official, model):
    first = official.responses.create(model=model, input="Hello.", instructions="You are a pirate.", **SHORT)
    second = official.responses.create(model=model, input="Hello.", previous_response_id=first.id, **SHORT)
    assert (first.instructions, second.instructions) == ("You are a pirate.", None)


def test_what_does_not_fit_loses_its_oldest_turns_or_is_refused(official, model):
    long = "Lima is a city. " * 120
    first = official.responses.create(model=model, input=long, **SHORT)
    with pytest.raises(openai.BadRequestError) as refused:
        official.responses.create(model=model, input=long, previous_response_id=first.id, **SHORT)
    assert refused.value.code == "context_length_exceeded"
    kept = official.responses.create(model=model, input=long, previous_response_id=first.id, truncation="auto", **SHORT)
    assert abs(kept.usage.input_tokens - first.usage.input_tokens) < 8


def test_the_background_is_read_on_behind_any_event(official, model, story):
    seen = []
    with official.responses.create(model=model, background=True, stream=True, **LONG) as stream:
        for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta" and len(seen) > 20:
                break
    response_id = seen[0].response.id
    with official.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number) as stream:
        seen += stream
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == story
    response = official.responses.retrieve(response_id)
    assert (response.status, response.output_text) == ("incomplete", story)


def test_cancelled_is_what_was_said_until_then(official, model, story):
    with official.responses.create(model=model, background=True, stream=True, **LONG) as stream:
        for event in stream:
            if event.type == "response.created":
                response_id = event.response.id
            if event.type == "response.output_text.delta":
                break
    response = official.responses.cancel(response_id)
    assert response.status == "cancelled"
    assert 0 < len(response.output_text) < len(story)
    assert story.startswith(response.output_text)


def test_the_node_client(server, node):
    assert node("responses.mjs", server.url) == ["chain", "stream", "conversation", "background", "cancel"]


def test_the_background_survives_its_replica(official, server, model, story, until):
    """Also its log probabilities, of which the dead one had not stored all: they are computed anew."""
    scored = LONG | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    undisturbed = official.responses.create(model=model, **scored).output[0].content[0]
    assert undisturbed.text == story
    assert len(undisturbed.logprobs) == LONG["max_output_tokens"]
    seen = []
    with (
        contextlib.suppress(httpx.TransportError, openai.APIConnectionError),
        official.responses.create(model=model, background=True, stream=True, **scored) as stream,
    ):
        for event in stream:
            seen.append(event)
            if len(seen) == 20:
                server.process("ray::ServeReplica").kill()
    assert 20 <= len(seen) < 300
    until(server.is_ready, "the next replica", 60)
    with official.responses.retrieve(
        seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
    ) as stream:
        seen += stream
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == story
    assert seen[-1].response.status == "incomplete"
    [part] = seen[-1].response.output[0].content
    assert part == undisturbed
    told = [one.logprob for event in seen if event.type == "response.output_text.delta" for one in event.logprobs]
    assert told == [one.logprob for one in undisturbed.logprobs]


def test_all_of_it_survives_the_server(official, server, launch, model, story):
    conversation = official.conversations.create(metadata={"topic": "names"})
    first = official.responses.create(model=model, input="My name is Odalys.", conversation=conversation.id, **SHORT)
    running = official.responses.create(model=model, background=True, **LONG)
    with official.responses.retrieve(running.id, stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta" and event.sequence_number > 20:
                break
    server.kill_all()
    again = launch(CONFIG, server.state_dir, like=server)
    assert official.responses.retrieve(first.id) == first
    assert official.conversations.retrieve(conversation.id).metadata == {"topic": "names"}
    second = official.responses.create(model=model, input="What is it?", conversation=conversation.id, **SHORT)
    assert second.usage.input_tokens > total(first)
    with official.responses.retrieve(running.id, stream=True) as stream:
        last = list(stream)[-1]
    assert (last.response.status, last.response.output_text) == ("incomplete", story)
    again.stop()
