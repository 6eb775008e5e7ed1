"""Tools in chats, as the official client and curl see them."""

from __future__ import annotations

from typing import Any

import pytest

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

HELLO = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now", "strict": True}}
BOTH = (Tool("weather", "tools[0].function.parameters", CITY, "Of a city"), Tool("now", "tools[1].function.parameters"))
SCRIPT = [
    TurnStarted(7, 3),
    TextDelta("Look", 1, Position(1, 1), ("Look",)),
    TextDelta(":", 3, Position(4, 4), (":", CallPiece(0, "weather", ""), CallPiece(0, None, '{"city"'))),
    TextDelta("", 1, Position(5, 5), (CallPiece(0, None, ': "Rome"}'),)),
    TextDelta("", 1, Position(6, 6), (CallPiece(1, "now", ""), CallPiece(1, None, "{}"))),
    TurnFinished("tool_calls", 7, 3, 6),
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


async def test_official_client_gets_calls(official, turns):
    turns.script = SCRIPT
    reply = await official.chat.completions.create(model="phi", messages=HELLO, tools=[WEATHER, NOW])
    request_id = turns.requests[0].request_id
    [choice] = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Look:"
    calls = [(call.id, call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [
        (call_id(request_id, 0), "function", "weather", '{"city": "Rome"}'),
        (call_id(request_id, 1), "function", "now", "{}"),
    ]
    assert max(len(call[0]) for call in calls) <= 40


async def test_a_reply_of_calls_only_has_no_content(client, turns):
    turns.script = [SCRIPT[0], *SCRIPT[4:]]
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "tools": [NOW]})
    assert response.json()["choices"][0]["message"]["content"] is None


async def test_without_calls_a_message_has_none(client):
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "tools": [NOW]})
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": "Hello, wörld", "refusal": None}


async def test_official_client_streams_calls(official, turns):
    turns.script = SCRIPT
    stream = await official.chat.completions.create(model="phi", messages=HELLO, tools=[WEATHER, NOW], stream=True)
    choices = [chunk.choices[0] async for chunk in stream]
    assert [choice.delta.content for choice in choices] == ["", "Look", ":", None, None, None]
    deltas = [call for choice in choices for call in choice.delta.tool_calls or []]
    found = [(call.index, call.id, call.type, call.function.name, call.function.arguments) for call in deltas]
    ids = [call_id(turns.requests[0].request_id, number) for number in range(2)]
    assert found == [
        (0, ids[0], "function", "weather", '{"city"'),
        (0, None, None, None, ': "Rome"}'),
        (1, ids[1], "function", "now", "{}"),
    ]
    assert [choice.finish_reason for choice in choices] == [*[None] * 5, "tool_calls"]


async def test_events_with_calls_have_positions(client, turns):
    turns.script = SCRIPT
    body = {"messages": HELLO, "tools": [WEATHER, NOW], "stream": True}
    response = await client.post("/v1/chat/completions", json=body)
    ids = [line for line in response.text.splitlines() if line.startswith("id: ")]
    assert ids == [f"id: {number}-{number:08x}" for number in (1, 4, 5, 6)]


async def test_who_reads_on_within_a_call_gets_the_rest_of_it(client, turns):
    turns.script = [SCRIPT[0], *SCRIPT[3:]]
    headers = {"x-request-id": "0" * 32, "x-resume-from": "4-00000004"}
    body = {"messages": HELLO, "tools": [WEATHER, NOW]}
    response = await client.post("/v1/chat/completions", json=body, headers=headers)
    [first, second] = response.json()["choices"][0]["message"]["tool_calls"]
    assert (first["id"], first["function"]) == (call_id("0" * 32, 0), {"name": "", "arguments": ': "Rome"}'})
    assert second["function"] == {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ToolUse(BOTH, ("weather", "now"))),
        ({"tool_choice": "auto"}, ToolUse(BOTH, ("weather", "now"))),
        ({"tool_choice": "none"}, ToolUse(BOTH, ())),
        ({"tool_choice": "required"}, ToolUse(BOTH, ("weather", "now"), is_required=True)),
        ({"tool_choice": named("now")}, ToolUse(BOTH, ("now",), is_required=True)),
        ({"tool_choice": allowed("auto", "now")}, ToolUse(BOTH, ("now",))),
        ({"tool_choice": allowed("required", "now", "weather")}, ToolUse(BOTH, ("weather", "now"), is_required=True)),
        ({"parallel_tool_calls": False}, ToolUse(BOTH, ("weather", "now"), is_parallel=False)),
        ({"tools": []}, None),
        ({"tools": [], "tool_choice": "none"}, None),
    ],
)
async def test_what_may_be_called_reaches_the_runner(client, turns, given, expected):
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "tools": [WEATHER, NOW], **given})
    assert response.status_code == 200, response.text
    assert turns.requests[0].tool_use == expected


CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
HISTORY = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


async def test_calls_and_results_reach_the_runner(client, turns):
    response = await client.post("/v1/chat/completions", json={"messages": HISTORY, "tools": [WEATHER]})
    assert response.status_code == 200, response.text
    assert turns.requests[0].messages == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]


async def test_official_client_sends_the_message_back_as_it_came(official, turns):
    turns.script = SCRIPT
    reply = await official.chat.completions.create(model="phi", messages=HELLO, tools=[WEATHER, NOW])
    message = reply.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "?"} for call in message.tool_calls]
    await official.chat.completions.create(model="phi", messages=[*HELLO, message, *results], tools=[WEATHER, NOW])
    assert [call["name"] for call in turns.requests[1].messages[1]["tool_calls"]] == ["weather", "now"]


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def messages(*behind: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*HELLO, *behind]}


# (what is given, the field that is named, a word of the message)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "array"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search is not supported"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "custom is not supported"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    (tool(name=""), "tools[0].function.name", ""),
    (tool(name="a b"), "tools[0].function.name", "a-z"),
    (tool(name="é"), "tools[0].function.name", "a-z"),
    (tool(name="x" * 65), "tools[0].function.name", "64"),
    (tool(name="f\n"), "tools[0].function.name", "a-z"),
    (tool(parameters=[]), "tools[0].function.parameters", "object"),
    (tool(parametres={}), "tools[0].function.parametres", "did you mean parameters"),
    ({"tools": [NOW, WEATHER, NOW]}, "tools[2].function.name", "twice"),
    ({"tools": [NOW] * 129}, "tools", "128"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", "required"),
    ({"tools": [NOW], "tool_choice": named("then")}, "tool_choice", "then"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "name": "now"}}, "tool_choice", "function"),
    ({"tools": [NOW], "tool_choice": allowed("auto", "then")}, "tool_choice", "then"),
    ({"tools": [NOW], "tool_choice": allowed("none", "now")}, "tool_choice", "allowed_tools"),
    ({"tools": [NOW], "min_tokens": 3}, "min_tokens", "tools"),
    ({"tools": [NOW], "ignore_eos": True}, "ignore_eos", "tools"),
    ({"tools": [NOW], "stop": "x"}, "stop", "tools"),
    ({"tools": [NOW], "stop_token_ids": [1]}, "stop_token_ids", "tools"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    (messages({"role": "tool", "tool_call_id": "call_1", "content": "x"}), "messages[1].tool_call_id", "call"),
    (messages({"role": "tool", "content": "x"}), "messages[1].tool_call_id", "required"),
    (messages({"role": "function", "name": "f", "content": "x"}), "messages[1].role", "tool"),
    (messages({"role": "assistant", "content": None}), "messages[1].content", "required"),
    (messages({"role": "user", "content": "x", "tool_calls": [CALL]}), "messages[1].tool_calls", "assistant"),
    (messages({"role": "user", "content": "x", "tool_call_id": "call_1"}), "messages[1].tool_call_id", "tool"),
    (messages({"role": "assistant", "tool_calls": [CALL, CALL]}), "messages[1].tool_calls", "same id"),
    ({"messages": [*HISTORY, HISTORY[2]]}, "messages[3].tool_call_id", "waits"),
    ({"messages": [*HISTORY[:2], *HELLO, HISTORY[2]]}, "messages[3].tool_call_id", "before it"),
    ({"messages": [*HISTORY[:2], {**HISTORY[2], "content": None}]}, "messages[2].content", "required"),
    ({"messages": HISTORY[:2], "continue_final_message": True}, "continue_final_message", "complete"),
]


@pytest.mark.parametrize(("given", "param", "word"), REFUSED)
async def test_wrong_forms_are_refused_by_name(refused_chat, given, param, word):
    await refused_chat({"messages": HELLO, **given}, param, word)


async def test_the_runners_repr_shows_no_arguments(client, turns):
    body = {"messages": HELLO, **tool(description="canary", parameters={"type": "object", "title": "canary"})}
    await client.post("/v1/chat/completions", json=body)
    assert "canary" not in repr(turns.requests[0])
    assert "canary" not in repr(TextDelta("", 1, Position(1, 1), (CallPiece(0, "f", "canary"),)))
