"""Tools in responses, as the official client and curl see them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from phi_cluster.cluster.turn_api import (
    CallPiece,
    Position,
    TextDelta,
    Tool,
    ToolUse,
    TurnFinished,
    TurnStarted,
    call_id,
)

RESPONSES = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Of a city", "parameters": CITY, "strict": True}
NOW = {"type": "function", "name": "now"}
TOOLS = (Tool("weather", "tools[0].parameters", CITY, "Of a city"), Tool("now", "tools[1].parameters"))
ASK = {"model": "phi", "input": "Hi", "tools": [WEATHER, NOW]}
BOTH_CALLS = [
    (CallPiece(0, "weather", ""), CallPiece(0, None, '{"city"')),
    (CallPiece(0, None, ': "Rome"}'),),
    (CallPiece(1, "now", ""), CallPiece(1, None, "{}")),
]


def script(*pieces: Any, reason: Any = "tool_calls") -> list[Any]:
    """A turn whose reply consists of these, given as one event each."""
    deltas = [
        TextDelta("".join(piece for piece in group if isinstance(piece, str)), 1, Position(number, number), group)
        for number, group in enumerate(pieces, start=1)
    ]
    return [TurnStarted(7, 3), *deltas, TurnFinished(reason, 7, 3, len(pieces))]


async def create(client: Any, **fields: Any) -> dict[str, Any]:
    answer = await client.post(RESPONSES, json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json())
    return answer.json()


async def stream(client: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post(RESPONSES, json={**ASK, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    blocks = [block for block in answer.text.split("\n\n") if block]
    events = [json.loads(block.partition("\ndata: ")[2]) for block in blocks]
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_official_client_gets_calls(official, turns):
    turns.script = script(("Look",), (":", *BOTH_CALLS[0]), *BOTH_CALLS[1:])
    response = await official.responses.create(**ASK)
    message, weather, now = response.output
    request_id = turns.requests[0].request_id
    assert (response.status, response.output_text, message.status) == ("completed", "Look:", "completed")
    assert (weather.type, weather.name, weather.arguments) == ("function_call", "weather", '{"city": "Rome"}')
    assert (now.name, now.arguments, now.status) == ("now", "{}", "completed")
    assert [one.call_id for one in (weather, now)] == [call_id(request_id, number) for number in range(2)]
    assert len({message.id, weather.id, now.id}) == 3
    assert response.tools[0].name == "weather"
    assert (response.tool_choice, response.parallel_tool_calls) == ("auto", True)
    assert turns.requests[0].tool_use == ToolUse(TOOLS, ("weather", "now"))
    assert (await official.responses.retrieve(response.id)).output == response.output


async def test_every_event_of_text_and_calls(client, turns):
    turns.script = script(("Look",), (":", *BOTH_CALLS[0]), *BOTH_CALLS[1:])
    events = await stream(client)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *["created", "in_progress"],
        *["output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done"],
        *["content_part.done", "output_item.done"],
        *["output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"],
        *["function_call_arguments.done", "output_item.done"],
        *["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"],
        "completed",
    ]
    output = events[-1]["response"]["output"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in done] == [0, 1, 2]
    assert [event["item"] for event in done] == output
    assert [event["item"]["id"] for event in added] == [item["id"] for item in output]
    assert (added[1]["item"]["arguments"], added[1]["item"]["status"]) == ("", "in_progress")
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert [(event["item_id"], event["output_index"], event["delta"]) for event in deltas] == [
        (output[1]["id"], 1, '{"city"'),
        (output[1]["id"], 1, ': "Rome"}'),
        (output[2]["id"], 2, "{}"),
    ]
    finals = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [event["arguments"] for event in finals] == ['{"city": "Rome"}', "{}"]


async def test_official_client_collects_streamed_calls(official, turns):
    turns.script = script(*BOTH_CALLS)
    async with official.responses.stream(**ASK) as managed:
        async for _ in managed:
            pass
        response = await managed.get_final_response()
    assert [(one.type, one.name, one.arguments) for one in response.output] == [
        ("function_call", "weather", '{"city": "Rome"}'),
        ("function_call", "now", "{}"),
    ]


async def test_a_call_that_was_cut_off_is_incomplete(client, turns):
    turns.script = script(*BOTH_CALLS[:1], reason="length")
    response = await create(client)
    [call] = response["output"]
    assert (response["status"], call["status"], call["arguments"]) == ("incomplete", "incomplete", '{"city"')


async def test_however_its_tokens_come_the_events_are_the_same(client, turns):
    turns.script = script(("Look",), *BOTH_CALLS)
    one = await stream(client)
    pieces = tuple(piece for group in (("Look",), *BOTH_CALLS) for piece in group)
    turns.script = script(pieces)
    other = await stream(client)
    ids = [turn.request_id for turn in turns.requests]

    def plain(events: Any) -> str:
        text = json.dumps([event for event in events if "response" not in event])
        for value in ids:
            text = text.replace(value, "id")
        return text

    assert plain(one) == plain(other)


# What came of calls.


async def test_results_go_on_from_the_calls(official, turns):
    turns.script = script(("Look:",), *BOTH_CALLS)
    first = await official.responses.create(**ASK)
    calls = [one for one in first.output if one.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": one.call_id, "output": one.name} for one in calls]
    turns.script = script(("Sunny",), reason="stop")
    second = await official.responses.create(**ASK | {"input": results}, previous_response_id=first.id)
    assert second.output_text == "Sunny"
    assert turns.requests[1].messages == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Look:",
            "tool_calls": [{"id": one.call_id, "name": one.name, "arguments": one.arguments} for one in calls],
        },
        *({"role": "tool", "content": one.name, "tool_call_id": one.call_id} for one in calls),
    ]
    items = [item async for item in official.responses.input_items.list(second.id, order="asc")]
    assert [(item.type, item.call_id, item.output) for item in items] == [
        ("function_call_output", one.call_id, one.name) for one in calls
    ]
    # Whoever goes on from there has it all.
    turns.script = script(("Bye",), reason="stop")
    await official.responses.create(model="phi", input="Thanks", previous_response_id=second.id)
    assert [one["role"] for one in turns.requests[2].messages] == [
        *["user", "assistant", "tool", "tool", "assistant", "user"],
    ]


async def test_a_client_sends_all_of_it_itself(official, turns):
    turns.script = script(*BOTH_CALLS[:2])
    first = await official.responses.create(**ASK, store=False)
    [call] = first.output
    history = [{"role": "user", "content": "Hi"}, call.model_dump()]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": [{"type": "input_text", "text": "21"}]}
    await official.responses.create(**ASK | {"input": [*history, result]}, store=False)
    assert [message["role"] for message in turns.requests[1].messages] == ["user", "assistant", "tool"]
    assert turns.requests[1].messages[2]["content"] == "21"


async def test_calls_are_a_part_of_their_conversation(official, turns):
    conversation = await official.conversations.create()
    turns.script = script(*BOTH_CALLS[:2])
    first = await official.responses.create(**ASK, conversation=conversation.id)
    [call] = first.output
    turns.script = script(("Sunny",), reason="stop")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    await official.responses.create(**ASK | {"input": [result]}, conversation=conversation.id)
    items = [item async for item in official.conversations.items.list(conversation.id, order="asc")]
    assert [item.type for item in items] == ["message", "function_call", "function_call_output", "message"]
    kept = await official.conversations.items.retrieve(items[1].id, conversation_id=conversation.id)
    assert (kept.call_id, kept.arguments) == (call.call_id, '{"city": "Rome"}')
    # And may be put there.
    given = [{"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}]
    given.append({"type": "function_call_output", "call_id": "c", "output": "noon"})
    await official.conversations.items.create(conversation.id, items=given)
    await official.responses.create(model="phi", input="And?", conversation=conversation.id)
    assert [message["role"] for message in turns.requests[2].messages][-3:] == ["assistant", "tool", "user"]


async def test_a_result_whose_call_was_deleted_does_not_stop_the_conversation(client, turns):
    turns.script = script(*BOTH_CALLS[:2])
    first = await create(client)
    result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "21"}
    second = await create(client, input=[result], previous_response_id=first["id"])
    assert (await client.delete(f"{RESPONSES}/{first['id']}")).status_code == 200
    await create(client, input="More", previous_response_id=second["id"])
    assert [message["role"] for message in turns.requests[2].messages] == ["tool", "assistant", "user"]


async def test_in_the_background_tools_are_remembered(client, turns, room):
    turns.script = script(*BOTH_CALLS)
    response = await create(client, background=True, tool_choice={"type": "function", "name": "now"})
    await turns.ended.wait()
    assert turns.requests[0].tool_use == ToolUse(TOOLS, ("now",), is_required=True)
    again = (await client.get(f"{RESPONSES}/{response['id']}")).json()
    while again["status"] in ("queued", "in_progress"):
        again = (await client.get(f"{RESPONSES}/{response['id']}")).json()
    assert [one["name"] for one in again["output"]] == ["weather", "now"]
    assert again["tool_choice"] == {"type": "function", "name": "now"}
    assert again["tools"][1] == {"type": "function", "name": "now", "parameters": None, "strict": None}


CALL = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "noon"}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


@pytest.mark.parametrize(
    ("given", "param", "word"),
    [
        ({"tools": [{"type": "web_search_preview"}]}, "tools[0].type", "web_search_preview is not supported"),
        ({"tools": [{"type": "mcp", "server_url": "http://127.0.0.1:9/"}]}, "tools[0].type", "mcp is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function", "not a field"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", ""),
        ({"tools": [NOW, NOW]}, "tools[1].name", "twice"),
        ({"tools": [NOW] * 129}, "tools", "128"),
        ({"tools": [{**NOW, "defer_loading": True}]}, "tools[0].defer_loading", "not supported"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "name": "then"}}, "tool_choice", "then"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice", "NAME"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "function"),
        ({"tool_choice": allowed("auto", "then")}, "tool_choice", "then"),
        ({"input": [RESULT]}, "input", "no call 'c'"),
        ({"input": [CALL, RESULT, RESULT]}, "input", "answered"),
        ({"input": [RESULT, CALL]}, "input", "before"),
        ({"input": [{**CALL, "name": "a b"}]}, "input[0].name", ""),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments", "string"),
        ({"input": [{**RESULT, "call_id": ""}]}, "input[0].call_id", "empty"),
        ({"input": [{**RESULT, "output": [{"type": "input_image"}]}]}, "input[0].output", "text only"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c"}]}, "input[0].type", "custom_tool_call"),
    ],
)
async def test_wrong_forms_are_refused_by_name(client, turns, given, param, word):
    answer = await client.post(RESPONSES, json={**ASK, **given})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], word in error["message"]) == (param, True), error
    assert not turns.requests


async def test_other_choices(client, turns):
    for choice, expected in (
        ("required", ToolUse(TOOLS, ("weather", "now"), is_required=True)),
        ("none", ToolUse(TOOLS, ())),
        (allowed("required", "now"), ToolUse(TOOLS, ("now",), is_required=True)),
    ):
        response = await create(client, tool_choice=choice, parallel_tool_calls=True)
        assert response["tool_choice"] == choice
        assert turns.requests[-1].tool_use == expected
