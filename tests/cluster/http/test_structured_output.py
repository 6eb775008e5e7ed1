"""Formats that a reply has to follow, and log probabilities, as the edge takes and tells them."""

from __future__ import annotations

from typing import Any

import pytest

from phi_cluster.cluster.turn_api import Position, TextDelta, TokenChoice, TokenLogprob, TurnFinished, TurnStarted

HELLO = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def by_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", **fields}}}


ASKED: list[tuple[dict[str, Any], tuple[str, Any] | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ("json_object", None)),
    (by_schema(schema=SCHEMA), ("json_schema", SCHEMA)),
    (by_schema(schema=SCHEMA, strict=True, description="d"), ("json_schema", SCHEMA)),
    (by_schema(), ("json_object", None)),
    ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
    ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, ("choice", ["yes", "no"])),
    ({"structured_outputs": {"json_object": True}}, ("json_object", True)),
    ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
    ({"guided_regex": "a+"}, ("regex", "a+")),
    ({"guided_choice": ["yes"]}, ("choice", ["yes"])),
    ({"guided_grammar": 'start: "a"', "response_format": {"type": "text"}}, ("grammar", 'start: "a"')),
]


@pytest.mark.parametrize(("given", "wanted"), ASKED)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_what_is_asked_for_reaches_the_runner(client, turns, path, given, wanted):
    prompt = {"messages": HELLO} if "chat" in path else {"prompt": "Hi"}
    response = await client.post(path, json={**prompt, **given})
    assert response.status_code == 200, response.text
    [request] = turns.requests
    found = request.wanted_format
    assert (found and (found.kind, found.value)) == wanted


# (what is given, the field that is named, a word of the message)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {}}, "response_format.type", "required"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "belongs"),
    ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema", "belongs"),
    (by_schema(name="bad name", schema=SCHEMA), "response_format.json_schema.name", ""),
    (by_schema(schema=[]), "response_format.json_schema.schema", "object"),
    (by_schema(schema="{}"), "response_format.json_schema.schema", "object"),
    (by_schema(schemas=SCHEMA), "response_format.json_schema.schemas", "did you mean schema"),
    ({"guided_regex": ""}, "guided_regex", "empty"),
    ({"guided_regex": 3}, "guided_regex", "string"),
    ({"guided_choice": []}, "guided_choice", "empty"),
    ({"guided_choice": [""]}, "guided_choice[0]", "empty"),
    ({"guided_choice": ["a"] * 2000}, "guided_choice", "1024"),
    ({"guided_grammar": ""}, "guided_grammar", "empty"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "both"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
    ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "guided_json", "both"),
    ({"guided_json": SCHEMA, "min_tokens": 3}, "min_tokens", "format"),
    ({"guided_json": SCHEMA, "ignore_eos": True}, "ignore_eos", "format"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"logprobs": 1}, "logprobs", "true or false"),
]


@pytest.mark.parametrize(("given", "param", "word"), REFUSED)
async def test_wrong_forms_are_refused_by_name(refused_chat, given, param, word):
    await refused_chat({"messages": HELLO, **given}, param, word)


# Log probabilities.


def told(text: str, logprob: float, *top: tuple[str, float]) -> TokenLogprob:
    return TokenLogprob(text.encode(), logprob, tuple(TokenChoice(t.encode(), p) for t, p in top))


SCRIPT = [
    TurnStarted(7, 3),
    TextDelta("Hel", 1, Position(1, 1), logprobs=(told("Hel", -0.5, ("Hel", -0.5), ("Hi", -1.0)),)),
    TextDelta("", 1, Position(2, 2), logprobs=(TokenLogprob("é".encode()[:1], -1.5, ()),)),
    TextDelta("é", 1, Position(3, 3), logprobs=(TokenLogprob("é".encode()[1:], -2.5, ()),)),
    TextDelta("", 1, Position(4, 4), logprobs=(told("!", -3.5),)),
    TurnFinished("stop", 7, 3, 5),
]
LOGPROBS = [-0.5, -1.5, -2.5, -3.5]


async def test_chat_tells_each_tokens_log_probability(official, turns):
    turns.script = SCRIPT
    reply = await official.chat.completions.create(model="phi", messages=HELLO, logprobs=True, top_logprobs=2)
    assert turns.requests[0].sampling["logprobs"] == 2
    content = reply.choices[0].logprobs.content
    assert [one.logprob for one in content] == LOGPROBS
    assert content[0].token == "Hel"
    assert [(one.token, one.logprob) for one in content[0].top_logprobs] == [("Hel", -0.5), ("Hi", -1.0)]
    assert bytes(content[1].bytes + content[2].bytes).decode() == "é"


async def test_a_stream_tells_them_with_the_text_that_they_complete(official, turns):
    turns.script = SCRIPT
    stream = await official.chat.completions.create(model="phi", messages=HELLO, logprobs=True, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert turns.requests[0].sampling["logprobs"] == 0
    found = [
        (chunk.delta.content, [one.logprob for one in chunk.logprobs.content]) for chunk in chunks if chunk.logprobs
    ]
    assert found == [("Hel", [-0.5]), ("é", [-1.5, -2.5]), ("", [-3.5])]
    assert chunks[-1].finish_reason == "stop"


async def test_completions_tell_them_in_their_older_form(official, turns):
    turns.script = SCRIPT
    reply = await official.completions.create(model="phi", prompt="Hi", logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs.token_logprobs == LOGPROBS
    assert logprobs.tokens == ["Hel", "\ufffd", "\ufffd", "!"]
    assert logprobs.text_offset == [0, 3, 4, 5]
    assert logprobs.top_logprobs[0] == {"Hel": -0.5, "Hi": -1.0}


async def test_offsets_go_on_through_a_stream(official, turns):
    turns.script = SCRIPT
    stream = await official.completions.create(model="phi", prompt="Hi", logprobs=0, stream=True)
    offsets = [c.choices[0].logprobs.text_offset async for c in stream if c.choices and c.choices[0].logprobs]
    assert offsets == [[0], [3, 4], [5]]


async def test_without_being_asked_nothing_is_told(client, turns):
    turns.script = SCRIPT
    response = await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert turns.requests[0].sampling["logprobs"] is None
    assert response.json()["choices"][0]["logprobs"] is None


async def test_a_reply_with_log_probabilities_cannot_be_read_on(client, turns):
    headers = {"x-request-id": "0" * 32, "x-resume-from": "0"}
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "logprobs": True}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-resume-from"
    assert not turns.requests
