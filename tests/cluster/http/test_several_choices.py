"""Several replies in one response: `n`, `best_of` and several prompts, whole and streamed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.turn_api import (
    CallPiece,
    ChoiceFinished,
    Position,
    TextDelta,
    TokenChoice,
    TokenLogprob,
    TurnFinished,
    TurnStarted,
)


def delta(text, choice, *logprobs):
    tokens = tuple(TokenLogprob(text.encode(), one, ()) for one in logprobs)
    return TextDelta(text, 1, Position(1, 1), (text,), tokens, choice)


TWO = [
    TurnStarted(num_prompt_tokens=7, num_cached_tokens=3),
    delta("a", 0),
    delta("x", 1),
    ChoiceFinished(1, "length"),
    delta("b", 0),
    ChoiceFinished(0, "stop"),
    TurnFinished("stop", num_prompt_tokens=7, num_cached_tokens=3, num_completion_tokens=5),
]
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}


@pytest.fixture
def two(turns):
    turns.script = list(TWO)
    return turns


async def test_official_client_chat(official, two):
    messages = CHAT["messages"]
    whole = await official.chat.completions.create(model="phi", messages=messages, n=2)
    assert [two.requests[0].num_choices] == [2]
    assert [(one.index, one.message.content, one.finish_reason) for one in whole.choices] == [
        (0, "ab", "stop"),
        (1, "x", "length"),
    ]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 5)
    stream = await official.chat.completions.create(
        model="phi", messages=messages, n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    told = [(c.index, c.delta.role, c.delta.content, c.finish_reason) for chunk in chunks for c in chunk.choices]
    assert told == [
        (0, "assistant", "", None),
        (1, "assistant", "", None),
        (0, None, "a", None),
        (1, None, "x", None),
        (1, None, None, "length"),
        (0, None, "b", None),
        (0, None, None, "stop"),
    ]
    assert last.usage.total_tokens == 12
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


async def test_usage_in_every_chunk_is_of_the_choice_that_it_tells_of(client, two, events):
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options})
    *chunks, last = events(response.content)
    told = [(chunk["choices"][0]["index"], chunk["usage"]["completion_tokens"]) for chunk in chunks]
    assert told[:2] == [(0, 0), (1, 0)]
    assert dict(told) == {0: 2, 1: 1}
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {7}


async def test_a_stream_without_usage_ends_as_it_should(client, two, events):
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    chunks = events(response.content)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    # No place to read on from.
    assert b"id: " not in response.content


async def test_log_probabilities_stay_with_their_choice(client, turns, events):
    turns.script = [TWO[0], delta("", 0, -1.0), delta("x", 1, -2.0), delta("b", 0, -3.0), *TWO[3:4], *TWO[5:]]
    turns.script[1] = replace(turns.script[1], logprobs=(TokenLogprob(b"a", -1.0, ()),))
    body = {"prompt": "p", "n": 2, "logprobs": 0}
    whole = (await client.post("/v1/completions", json=body)).json()
    assert [one["logprobs"]["token_logprobs"] for one in whole["choices"]] == [[-1.0, -3.0], [-2.0]]
    assert [one["logprobs"]["text_offset"] for one in whole["choices"]] == [[0, 1], [0]]
    streamed = events((await client.post("/v1/completions", json={**body, "stream": True})).content)
    told = [(c["index"], c["logprobs"]["token_logprobs"]) for chunk in streamed for c in chunk["choices"] if c["text"]]
    assert told == [(1, [-2.0]), (0, [-1.0, -3.0])]


async def test_each_of_several_replies_has_calls_of_its_own(official, turns):
    def piece(choice, *call):
        return TextDelta("", 1, Position(1, 1), (CallPiece(*call),), (), choice)

    turns.script = [
        *(TWO[0], piece(0, 0, "now", ""), piece(1, 0, "then", ""), piece(0, 0, None, "{}"), piece(1, 0, None, '{"a"')),
        *(piece(1, 0, None, ": 1}"), ChoiceFinished(1, "tool_calls"), ChoiceFinished(0, "tool_calls")),
        replace(TWO[-1], finish_reason="tool_calls"),
    ]
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("now", "then")]
    body = {"messages": CHAT["messages"], "model": "phi", "n": 2, "tools": tools}
    whole = await official.chat.completions.create(**body)
    calls = [choice.message.tool_calls[0] for choice in whole.choices]
    told = [("now", "{}"), ("then", '{"a": 1}')]
    assert [(call.function.name, call.function.arguments) for call in calls] == told
    assert [choice.finish_reason for choice in whole.choices] == ["tool_calls"] * 2
    assert len({call.id for call in calls}) == 2
    async with official.chat.completions.stream(**body) as managed:
        async for _ in managed:
            pass
        final = await managed.get_final_completion()
    streamed = [choice.message.tool_calls[0] for choice in final.choices]
    assert [(call.function.name, call.function.arguments) for call in streamed] == told
    assert (turns.requests[0].num_choices, turns.requests[0].tool_use.callable) == (2, ("now", "then"))


async def test_the_likeliest_of_several_is_told(client, turns):
    turns.script = [
        TWO[0],
        delta("low", 0, -5.0),
        delta("best", 1, -1.0),
        delta("long", 2, -2.0, -2.0, -2.0),
        *(ChoiceFinished(i, "stop") for i in range(4)),
        TWO[-1],
    ]
    whole = (await client.post("/v1/completions", json={"prompt": "p", "n": 2, "best_of": 4})).json()
    assert [(one["index"], one["text"], one["logprobs"]) for one in whole["choices"]] == [
        (0, "best", None),
        (1, "long", None),
    ]
    # All that was made is counted.
    assert whole["usage"]["completion_tokens"] == 5
    assert (turns.requests[0].num_choices, turns.requests[0].sampling["logprobs"]) == (4, 0)


async def test_several_prompts_are_a_turn_each(client, turns, events):
    turns.script = [*TWO]
    body = {"prompt": ["one", [1, 2]], "n": 2}
    whole = (await client.post("/v1/completions", json=body)).json()
    assert [(one["index"], one["text"]) for one in whole["choices"]] == [(0, "ab"), (1, "x"), (2, "ab"), (3, "x")]
    assert whole["usage"] == {
        "prompt_tokens": 14,
        "completion_tokens": 10,
        "total_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 6},
    }
    assert [turn.prompt for turn in turns.requests] == ["one", [1, 2]]
    assert len({turn.request_id for turn in turns.requests}) == 2
    streamed = events((await client.post("/v1/completions", json={**body, "stream": True})).content)
    texts = ["", "", "", ""]
    for chunk in streamed:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["ab", "x", "ab", "x"]
    ends = [c["index"] for chunk in streamed for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


async def test_several_prompts_with_one_reply_each(client, turns):
    whole = (await client.post("/v1/completions", json={"prompt": ["one", "two"]})).json()
    assert [one["text"] for one in whole["choices"]] == ["Hello, wörld"] * 2
    assert [one["finish_reason"] for one in whole["choices"]] == ["stop"] * 2


async def test_one_prompt_that_fails_ends_all(client, turns):
    gate = asyncio.Event()
    turns.script = [TWO[0], Overloaded("full"), gate]
    response = await client.post("/v1/completions", json={"prompt": ["one", "two", "three"]})
    assert response.status_code == 429
    assert len(turns.ends) == len(turns.requests)
    assert turns.requests


async def test_a_client_that_leaves_ends_all(connect, turns):
    turns.script = [*TWO[:3], asyncio.Event()]
    connection = connect("/v1/completions", {"prompt": ["one", "two"], "n": 2, "stream": True})
    for _ in range(4):
        await connection.next()
    connection.disconnect()
    await connection.finished()
    assert turns.ends == ["cancelled", "cancelled"]


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"prompt": ["a", "b"]}, {"x-session-id": "s"}, "prompt"),
        ({"prompt": ["a", "b"]}, {"x-resume-from": "0", "x-request-id": "0" * 32}, "prompt"),
        ({"prompt": "a", "n": 2}, {"x-resume-from": "0", "x-request-id": "0" * 32}, "x-resume-from"),
        ({"prompt": "a", "echo": True}, {"x-resume-from": "0", "x-request-id": "0" * 32}, "echo"),
    ],
)
async def test_what_does_not_go_together_is_refused_by_name(client, turns, body, headers, param):
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert turns.requests == []


async def test_a_server_with_few_places_allows_fewer(make_app, settings, connect, turns):
    app = make_app(replace(settings, max_choices=2))
    for path, body, param in (
        ("/v1/chat/completions", {**CHAT, "n": 3}, "n"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
    ):
        connection = connect(path, body, over=app)
        answer = await connection.until(b"at most 2")
        assert f'"param":"{param}"'.encode() in answer
    assert turns.requests == []


# Echo.

ECHO = (TokenLogprob(b"On", None, ()), TokenLogprob(b"ce", -0.5, (TokenChoice(b"ce", -0.5), TokenChoice(b"ly", -3.0))))


async def test_the_prompt_is_told_before_the_reply(client, turns, events):
    turns.script = [replace(TWO[0], echo="Once", echo_logprobs=ECHO), delta(" more", 0, -2.0), TWO[-1]]
    body = {"prompt": "Once", "echo": True, "logprobs": 2}
    [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert turns.requests[0].echo
    assert choice["text"] == "Once more"
    assert choice["logprobs"] == {
        "tokens": ["On", "ce", " more"],
        "token_logprobs": [None, -0.5, -2.0],
        "top_logprobs": [None, {"ce": -0.5, "ly": -3.0}, {}],
        "text_offset": [0, 2, 4],
    }
    streamed = events((await client.post("/v1/completions", json={**body, "stream": True})).content)
    assert [chunk["choices"][0]["text"] for chunk in streamed] == ["Once", " more", ""]
    assert [c["logprobs"]["text_offset"] for chunk in streamed[:2] for c in chunk["choices"]] == [[0, 2], [4]]


async def test_each_choice_repeats_its_own_prompt(client, turns, events):
    turns.script = [replace(TWO[0], echo="Once"), *TWO[1:]]
    body = {"prompt": ["Once", "Once"], "n": 2, "echo": True}
    whole = (await client.post("/v1/completions", json=body)).json()
    assert [one["text"] for one in whole["choices"]] == ["Onceab", "Oncex"] * 2
    streamed = events((await client.post("/v1/completions", json={**body, "stream": True})).content)
    texts = ["", "", "", ""]
    for chunk in streamed:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["Onceab", "Oncex"] * 2


async def test_only_the_prompt(client, turns):
    turns.script = [replace(TWO[0], echo="Once"), TurnFinished("length", 7, 0, 0)]
    whole = (await client.post("/v1/completions", json={"prompt": "Once", "echo": True, "max_tokens": 0})).json()
    assert turns.requests[0].sampling["max_tokens"] == 0
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == ("Once", "length")
    assert whole["usage"]["completion_tokens"] == 0


async def test_the_prompts_probabilities_do_not_pick_the_best(client, turns):
    turns.script = [
        replace(TWO[0], echo="Once", echo_logprobs=ECHO),
        delta("a", 0, -9.0),
        delta("b", 1, -1.0),
        ChoiceFinished(0, "stop"),
        ChoiceFinished(1, "stop"),
        TWO[-1],
    ]
    whole = (await client.post("/v1/completions", json={"prompt": "Once", "echo": True, "best_of": 2})).json()
    assert [one["text"] for one in whole["choices"]] == ["Onceb"]
