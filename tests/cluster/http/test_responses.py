"""Responses as the official client and curl see them: whole, streamed, gone on from, deleted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from phi_cluster.cluster.errors import ContextOverflow, InvalidRequest, Overloaded, SessionBusy
from phi_cluster.cluster.http.response_schemas import ResponseRequest
from phi_cluster.cluster.http.strict_model import validated
from phi_cluster.cluster.turn_api import Position, TextDelta, TurnFinished, TurnStarted

RESPONSES = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
ASK = {"model": "phi", "input": "Hi"}
ALL_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def valid(body: dict[str, Any]) -> dict[str, Any]:
    """The response itself, if it is one by OpenAI's own model, without fields that this does not have."""
    checked = Response.model_validate(body)
    # Theirs, but not yet in the model.
    assert set(checked.model_extra or {}) <= {"store"}
    return body


def typed_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each valid by OpenAI's own models, with the `event:` line that belongs to it."""
    found = []
    for block in text.split("\n\n"):
        if block:
            kind, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert kind == f"event: {event['type']}"
            EVENT.validate_python(event)
            if "response" in event:
                valid(event["response"])
            found.append(event)
    return found


async def create(client, **fields) -> dict[str, Any]:
    answer = await client.post(RESPONSES, json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    return valid(answer.json())


async def stream(client, **fields) -> list[dict[str, Any]]:
    answer = await client.post(RESPONSES, json={**ASK, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return typed_events(answer.text)


def said(turn) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in turn.messages]


# Making one.


async def test_official_client_gets_a_whole_response(official, turns):
    response = await official.responses.create(model="phi", input="Hi", temperature=0)
    assert response.id == f"resp_{turns.requests[0].request_id}"
    assert response.output_text == "Hello, wörld"
    assert response.status == "completed"
    assert response.created_at == 1_750_000_000
    [message] = response.output
    assert (message.role, message.status, message.type) == ("assistant", "completed", "message")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 5, 12)
    assert usage.input_tokens_details.cached_tokens == 3
    assert turns.requests[0].session_id == response.id
    assert turns.requests[0].sampling["temperature"] == 0


async def test_official_client_streams(official):
    events = [event async for event in await official.responses.create(model="phi", input="Hi", stream=True)]
    assert [event.type for event in events] == ALL_EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["Hello", ", wörld"]
    async with official.responses.stream(model="phi", input="Hi") as managed:
        async for _ in managed:
            pass
        assert (await managed.get_final_response()).output_text == "Hello, wörld"


async def test_every_event_on_the_wire(client):
    events = await stream(client, metadata={"a": "b"}, instructions="Be brief")
    assert [event["type"] for event in events] == ALL_EVENTS
    created, in_progress, item, part, first, second, text, part_done, item_done, completed = events
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert created["response"] == in_progress["response"]
    assert created["response"]["usage"] is None
    message_id = item["item"]["id"]
    assert item["item"] == {
        **{"type": "message", "id": message_id, "role": "assistant", "status": "in_progress"},
        "content": [],
    }
    place = {"item_id": message_id, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert part == {"type": "response.content_part.added", "sequence_number": 3, **place, "part": empty}
    head = {"type": "response.output_text.delta", **place, "logprobs": []}
    assert first == {**head, "sequence_number": 4, "delta": "Hello"}
    assert second == {**head, "sequence_number": 5, "delta": ", wörld"}
    assert (text["text"], part_done["part"]["text"]) == ("Hello, wörld", "Hello, wörld")
    assert item_done["item"]["content"] == [part_done["part"]]
    whole = completed["response"]
    assert whole["output"] == [item_done["item"]]
    assert (whole["metadata"], whole["instructions"]) == ({"a": "b"}, "Be brief")
    assert (await client.get(f"{RESPONSES}/{whole['id']}")).json() == whole


async def test_read_on_behind_every_number_there_is_exactly_the_rest(client):
    events = await stream(client)
    path = f"{RESPONSES}/{events[0]['response']['id']}?stream=true"
    assert typed_events((await client.get(path)).text) == events
    for number in range(len(events) + 2):
        rest = await client.get(f"{path}&starting_after={number}")
        assert rest.status_code == 200
        assert typed_events(rest.text) == events[number + 1 :]


async def test_pieces_are_events_however_they_come(client, turns):
    turns.script = [
        TurnStarted(7, 3),
        TextDelta("Hello, wörld", 3, Position(3, 1), ("He", "llo", ", wörld")),
        TurnFinished("stop", 7, 3, 3),
    ]
    deltas = [event["delta"] for event in await stream(client) if event["type"] == "response.output_text.delta"]
    assert deltas == ["He", "llo", ", wörld"]


async def test_everything_given_reaches_the_runner(client, turns):
    body = await create(
        client,
        input=[
            {"role": "developer", "content": "Be nice"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}], "id": "msg_1"},
            {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"type": "input_text", "text": "d"}]},
        ],
        instructions="Be brief",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.25,
        truncation="auto",
        metadata={"k": "v"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="p",
        parallel_tool_calls=False,
        tool_choice="none",
        tools=[],
        service_tier="auto",
        text={"format": {"type": "text"}},
        reasoning={},
        include=[],
        top_logprobs=0,
        max_tool_calls=3,
        prompt_cache_retention="24h",
        seed=4,
    )
    [turn] = turns.requests
    assert said(turn) == [
        ("system", "Be brief"),
        ("system", "Be nice"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c\nd"),
    ]
    assert turn.truncate
    assert turn.cache_hint == "p"
    sampling = turn.sampling
    assert (sampling["max_tokens"], sampling["temperature"], sampling["top_p"], sampling["seed"]) == (9, 0.5, 0.25, 4)
    given = {"max_output_tokens": 9, "temperature": 0.5, "top_p": 0.25, "truncation": "auto", "metadata": {"k": "v"}}
    given |= {"user": "u", "safety_identifier": "s", "prompt_cache_key": "p", "parallel_tool_calls": False}
    given |= {"tool_choice": "none", "max_tool_calls": 3, "prompt_cache_retention": "24h", "store": True}
    assert {name: body[name] for name in given} == given


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("text.format", "json_object", None)),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "integer", "maximum": 10**40}, "strict": True},
            ("text.format.schema", "json_schema", {"type": "integer", "maximum": 10**40}),
        ),
    ],
)
@pytest.mark.parametrize("background", [False, True])
async def test_a_format_reaches_the_runner_and_is_told(client, turns, given, wanted, background):
    created = await create(client, text={"format": given}, background=background)
    await turns.ended.wait()
    found = turns.requests[0].wanted_format
    assert (found and (found.param, found.kind, found.value)) == wanted
    for told in (created, (await client.get(f"{RESPONSES}/{created['id']}")).json()):
        assert {k: v for k, v in told["text"]["format"].items() if v is not None} == given


async def test_length_is_incomplete(client, turns):
    turns.script[-1] = TurnFinished("length", 7, 3, 5)
    body = await create(client)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert body["completed_at"] is None
    last = (await stream(client))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


async def test_a_reply_without_a_word_is_a_message_all_the_same(client, turns):
    turns.script = [TurnStarted(7, 3), TurnFinished("stop", 7, 3, 1)]
    events = await stream(client)
    assert [event["type"] for event in events] == [one for one in ALL_EVENTS if not one.endswith("delta")]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


# Going on.


async def test_a_chain_is_one_session(client, turns, sessions):
    first = await create(client, input="One", instructions="Be brief")
    second = await create(client, input="Two", previous_response_id=first["id"])
    third = await create(client, input="Three", previous_response_id=second["id"], instructions="Be long")
    assert [turn.session_id for turn in turns.requests] == [first["id"]] * 3
    assert second["previous_response_id"] == first["id"]
    reply = ("assistant", "Hello, wörld")
    # Instructions are not carried over.
    assert said(turns.requests[1]) == [("user", "One"), reply, ("user", "Two")]
    assert said(turns.requests[2]) == [
        ("system", "Be long"),
        *[("user", "One"), reply, ("user", "Two"), reply, ("user", "Three")],
    ]
    assert third["id"] != first["id"]
    assert sessions.branches == []


async def test_from_an_older_response_a_branch_begins(client, turns, sessions):
    first = await create(client, input="One")
    second = await create(client, input="Two", previous_response_id=first["id"])
    branch = await create(client, input="Zwei", previous_response_id=first["id"])
    assert turns.requests[2].session_id == branch["id"]
    assert said(turns.requests[2])[0] == ("user", "One")
    [(tenant, origin, name)] = sessions.branches
    assert (tenant, name) == ("default", branch["id"])
    assert (origin.session_id, origin.num_turns) == (first["id"], 1)
    deeper = await create(client, input="Drei", previous_response_id=branch["id"])
    await create(client, input="Vier", previous_response_id=deeper["id"])
    await create(client, input="Fünf", previous_response_id=deeper["id"])
    # What it began with counts as well.
    assert (sessions.branches[1][1].session_id, sessions.branches[1][1].num_turns) == (branch["id"], 3)
    # Both go on, each in its own session.
    await create(client, input="More", previous_response_id=second["id"])
    assert turns.requests[-1].session_id == first["id"]
    assert [turn.session_id for turn in turns.requests[3:5]] == [branch["id"]] * 2


async def test_what_failed_is_no_reason_for_a_branch(client, turns):
    first = await create(client)
    turns.script = [TurnStarted(7, 3), TextDelta("Hel", 1, Position(1, 1)), Overloaded("gone")]
    assert (await client.post(RESPONSES, json={**ASK, "previous_response_id": first["id"]})).status_code == 429
    await stream(client, previous_response_id=first["id"])
    assert [turn.session_id for turn in turns.requests] == [first["id"]] * 3


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_a_key_may_still_use_is_told(client, turns, streamed):
    turns.script[0] = TurnStarted(7, 3, rates={"requests": (60, 41, 0.5)})
    answer = await client.post(RESPONSES, json={**ASK, "stream": streamed})
    assert answer.headers["x-ratelimit-remaining-requests"] == "41"
    turns.script[0] = TurnStarted(7, 3)
    answer = await client.post(RESPONSES, json={**ASK, "stream": streamed})
    assert "x-ratelimit-remaining-requests" not in answer.headers


async def test_without_store_nothing_is_kept(client, turns, tmp_path):
    first = await create(client, input="canary one")
    body = await create(client, input="canary two", store=False, previous_response_id=first["id"])
    assert body["store"] is False
    assert turns.requests[1].session_id is None
    assert len(turns.requests[1].messages) == 3
    assert (await client.get(f"{RESPONSES}/{body['id']}")).status_code == 404
    assert (await client.post(RESPONSES, json={**ASK, "previous_response_id": body["id"]})).status_code == 404
    assert [event["type"] for event in await stream(client, store=False)] == ALL_EVENTS
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"canary one" in files
    assert b"canary two" not in files
    assert body["id"].encode() not in files


async def test_messages_may_be_named_instead_of_sent(client, turns):
    """As some clients do with all that they have got before."""
    first = await create(client, input="One")
    asked = (await client.get(f"{RESPONSES}/{first['id']}/input_items")).json()["first_id"]
    references = [{"type": "item_reference", "id": one} for one in (asked, first["output"][0]["id"], asked)]
    second = await create(client, input=[*references, {"role": "user", "content": "Two"}])
    expected = [("user", "One"), ("assistant", "Hello, wörld"), ("user", "One"), ("user", "Two")]
    assert said(turns.requests[1]) == expected
    items = (await client.get(f"{RESPONSES}/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert [(item["role"], item["content"][0]["text"]) for item in items] == expected
    assert len({item["id"] for item in items}) == 4
    # Copies: they stay.
    await client.delete(f"{RESPONSES}/{first['id']}")
    await create(client, input="Three", previous_response_id=second["id"], store=False)
    assert said(turns.requests[2])[:4] == expected
    for name, headers in (("msg_nothing", {}), (second["output"][0]["id"], {"authorization": "Bearer other"})):
        given = {**ASK, "input": ["x", {"type": "item_reference", "id": name}]}
        given["input"][0] = {"role": "user", "content": "x"}
        answer = await client.post(RESPONSES, json=given, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input[1].id")


# What goes wrong.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextOverflow("3 tokens too many", param="messages"), 400, "context_length_exceeded"),
        (SessionBusy("another turn is running"), 409, "session_busy"),
        (Overloaded("no room", retry_after=2.2), 429, "overloaded"),
    ],
)
async def test_an_error_before_the_first_event_is_a_status(client, turns, sessions, streamed, error, status, code):
    turns.script = [error]
    answer = await client.post(RESPONSES, json={**ASK, "stream": streamed})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers.get("retry-after") == ("3" if status == 429 else None)
    # Nothing is left of it.
    response_id = f"resp_{turns.requests[0].request_id}"
    assert (await client.get(f"{RESPONSES}/{response_id}")).status_code == 404


@pytest.mark.parametrize("store", [False, True])
async def test_an_error_in_mid_stream_fails_the_response(client, turns, store):
    turns.script[2:] = [Overloaded("the engine is gone")]
    events = await stream(client, store=store)
    assert [event["type"] for event in events] == [
        *[*ALL_EVENTS[:5], *ALL_EVENTS[6:9]],
        "response.failed",
    ]
    response = events[-1]["response"]
    assert response["error"] == {"code": "rate_limit_exceeded", "message": "the engine is gone"}
    assert (response["status"], response["output"][0]["status"]) == ("failed", "incomplete")
    if store:
        assert (await client.get(f"{RESPONSES}/{response['id']}")).json() == response


async def test_an_error_in_mid_reply_leaves_no_half_reply(client, turns):
    turns.script[2:] = [Overloaded("the engine is gone")]
    answer = await client.post(RESPONSES, json=ASK)
    assert answer.status_code == 429
    assert "Hello" not in answer.text


@pytest.mark.parametrize("started", [False, True])
async def test_what_nobody_expected_is_logged_and_not_told(client, turns, caplog, started):
    turns.script[1 if started else 0 :] = [KeyError("/root/secret/path.py")]
    answer = await client.post(RESPONSES, json={**ASK, "stream": True})
    assert answer.status_code == (200 if started else 500)
    assert "secret" not in answer.text
    assert "server_error" in answer.text
    assert "secret" in caplog.text


async def test_a_client_that_leaves_ends_the_response_with_what_it_got(connect, client, turns):
    turns.script[3:] = [asyncio.Event()]
    connection = connect(RESPONSES, {**ASK, "stream": True})
    await connection.until(b"Hello")
    connection.disconnect()
    await connection.finished()
    await asyncio.wait_for(turns.ended.wait(), 5)
    assert turns.ends == ["cancelled"]
    response_id = f"resp_{turns.requests[0].request_id}"
    body: dict[str, Any] = {"status": "in_progress"}
    while body["status"] == "in_progress":
        body = valid((await client.get(f"{RESPONSES}/{response_id}")).json())
    assert body["status"] == "cancelled"
    assert body["output"][0]["content"][0]["text"] == "Hello"
    turns.script = [TurnStarted(1, 0), TurnFinished("stop", 1, 0, 0)]
    await create(client, previous_response_id=response_id)
    assert said(turns.requests[-1])[1] == ("assistant", "Hello")


async def test_a_client_that_leaves_before_the_first_word_leaves_nothing(connect, client, turns):
    turns.script = [asyncio.Event()]
    connection = connect(RESPONSES, ASK)
    await asyncio.wait_for(turns.begun.wait(), 5)
    connection.disconnect()
    await connection.finished()
    response_id = f"resp_{turns.requests[0].request_id}"
    while (await client.get(f"{RESPONSES}/{response_id}")).status_code != 404:
        pass
    assert turns.ends == ["cancelled"]


# Looking and deleting.


async def test_input_items_are_paged(client):
    body = await create(client, input=[{"role": "user", "content": str(number)} for number in range(5)])
    path = f"{RESPONSES}/{body['id']}/input_items"
    page = (await client.get(path, params={"limit": 2, "order": "asc"})).json()
    checked = ResponseItemList.model_validate(page)
    assert [item.content[0].text for item in checked.data] == ["0", "1"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (
        True,
        page["data"][0]["id"],
        page["data"][1]["id"],
    )
    rest = (await client.get(path, params={"limit": 3, "order": "asc", "after": page["last_id"]})).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "3", "4"]
    assert rest["has_more"] is False


async def test_the_official_client_turns_pages(official):
    """The last one comes first."""
    response = await official.responses.create(
        model="phi", input=[{"role": "user", "content": str(number)} for number in range(5)]
    )
    listed = [item async for item in official.responses.input_items.list(response.id, limit=2)]
    assert [item.content[0].text for item in listed] == ["4", "3", "2", "1", "0"]
    assert (await official.responses.retrieve(response.id)).output_text == "Hello, wörld"
    await official.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await official.responses.retrieve(response.id)


async def test_another_key_finds_nothing(client):
    body = await create(client)
    other = {"authorization": "Bearer other"}
    unknown = "resp_" + "0" * 32
    for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        theirs = await client.request(method, f"{RESPONSES}/{body['id']}{path}", headers=other)
        nobodys = await client.request(method, f"{RESPONSES}/{unknown}{path}")
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text.replace(body["id"], "ID") == nobodys.text.replace(unknown, "ID")
    ask = {**ASK, "previous_response_id": body["id"]}
    assert (await client.post(RESPONSES, json=ask, headers=other)).status_code == 404
    assert (await client.get(f"{RESPONSES}/{body['id']}")).status_code == 200


async def test_deleted_is_gone_to_the_last_byte(client, turns, sessions, tmp_path):
    first = await create(client, input="canary-one " * 300, metadata={"k": "canary-one"})
    second = await create(client, input="canary-two", previous_response_id=first["id"])
    branch = await create(client, input="canary-three", previous_response_id=first["id"])
    for one in (first, branch):
        sessions.add("default", one["id"])
    answer = await client.delete(f"{RESPONSES}/{first['id']}")
    assert answer.json() == {"id": first["id"], "object": "response", "deleted": True}
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"canary-one" not in files
    assert b"canary-two" in files
    # The sessions that have seen it have gone with it, also that of the branch.
    assert sessions.known == {}
    assert (await client.get(f"{RESPONSES}/{first['id']}")).status_code == 404
    assert (await client.delete(f"{RESPONSES}/{first['id']}")).status_code == 404
    missing = await client.post(RESPONSES, json={**ASK, "previous_response_id": first["id"]})
    assert missing.json()["error"] | {"message": ""} == {
        **{"message": "", "type": "invalid_request_error"},
        **{"param": "previous_response_id", "code": "previous_response_not_found"},
    }
    # What goes on from it goes on without it.
    await create(client, input="Next", previous_response_id=second["id"])
    assert said(turns.requests[-1]) == [("user", "canary-two"), ("assistant", "Hello, wörld"), ("user", "Next")]


async def test_only_the_background_can_be_cancelled(client):
    body = await create(client)
    answer = await client.post(f"{RESPONSES}/{body['id']}/cancel")
    assert answer.status_code == 400
    assert "background" in answer.json()["error"]["message"]


# Bad input.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0].content"),
        ({"input": [{"type": "computer_call_output", "call_id": "c", "output": "x"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference", "id": 5}]}, "input[0].id"),
        ({"input": [{"type": "item_reference", "id": "msg_1", "role": "user"}]}, "input[0].role"),
        ({"input": ["x"] * 3}, "input[0]"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "text", "name": "n"}}}, "text.format.name"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"conversation": 5}, "conversation"),
        ({"conversation": {"id": "conv_1", "x": 1}}, "conversation"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": False, "background": True}, "background"),
        ({"store": False, "conversation": "conv_1"}, "store"),
        ({"store": "no"}, "store"),
        ({"truncation": "some"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 129}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs", "code_interpreter_call.outputs"]}, "include"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"max_ouput_tokens": 5}, "max_ouput_tokens"),
    ],
)
async def test_bad_fields_are_named(client, turns, fields, param):
    given = {**ASK, **fields}
    answer = await client.post(RESPONSES, json={name: value for name, value in given.items() if value is not None})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert turns.requests == []


def test_a_huge_list_is_refused():
    items = [{"role": "user", "content": "x"}] * 4097
    with pytest.raises(InvalidRequest, match="input must have at most 4096 items"):
        validated(ResponseRequest, {"input": items})
    assert len(validated(ResponseRequest, {"input": items[:4096]}).input) == 4096


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
@pytest.mark.parametrize("name", ["resp_" + "0" * 32, "", "../../etc/passwd", "x" * 5000, "'; DROP TABLE responses"])
async def test_names_of_nothing_are_404(client, turns, field, name):
    answer = await client.post(RESPONSES, json={**ASK, field: name})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == field
    assert len(answer.text) < 500
    assert turns.requests == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?stream=yes", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?stream=true&starting_after=-1", "starting_after"),
        ("?stream=true&starting_after=x", "starting_after"),
        ("?stream=true&starting_after=99999999999", "starting_after"),
        ("?stream=true&stream=true", "stream"),
        ("?include[]=x", "include"),
        ("?other=1", "other"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
    ],
)
async def test_bad_parameters_are_named(client, query, param):
    body = await create(client)
    answer = await client.get(f"{RESPONSES}/{body['id']}{query}")
    assert answer.status_code == (404 if param == "after" else 400)
    assert answer.json()["error"]["param"] == param


async def test_headers_of_chats_have_no_meaning_here(client, turns):
    answer = await client.post(RESPONSES, json=ASK, headers={"x-session-id": "demo"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-session-id")
    headers = {"x-resume-from": "0", "x-request-id": "a" * 32}
    answer = await client.post(RESPONSES, json=ASK, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-resume-from")
    assert "starting_after" in answer.json()["error"]["message"]
    assert turns.requests == []
