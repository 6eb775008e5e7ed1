"""Log probabilities in responses: whole, streamed, kept, and sent back (test_background.py: gone on with by another
process)."""

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
    TextPiece,
    TokenChoice,
    TokenLogprob,
    TurnFinished,
    TurnStarted,
)

RESPONSES = "/v1/responses"
INCLUDE = "message.output_text.logprobs"
EVENT = TypeAdapter(ResponseStreamEvent)
ASK = {"model": "phi", "input": "Hi", "include": [INCLUDE], "top_logprobs": 2}


def one(token: bytes, logprob: float) -> TokenLogprob:
    return TokenLogprob(token, logprob, (TokenChoice(token, logprob), TokenChoice(b"\xff", -9.0)))


# The second piece was completed by the second of two tokens.
PIECES = (
    TextPiece("Hello", (one(b"Hello", -0.25),)),
    TextPiece(" w\u00f6", (one(b" w\xc3", -0.5), one(b"\xb6", -0.125))),
)
CALLS = (CallPiece(0, "now", ""), CallPiece(0, None, "{}"))


def script(*pieces: Any) -> list[Any]:
    deltas = [
        TextDelta("".join(one.text for one in group if isinstance(one, TextPiece)), 1, Position(i, i), group)
        for i, group in enumerate(pieces, start=1)
    ]
    return [TurnStarted(7, 3), *deltas, TurnFinished("stop", 7, 3, 3)]


@pytest.fixture(autouse=True)
def spoken(turns):
    turns.script = script(*((piece,) for piece in PIECES))


def told(*tokens: TokenLogprob) -> list[dict[str, Any]]:
    def choice(token: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return [{**choice(*token[:2]), "top_logprobs": [choice(*other) for other in token.top]} for token in tokens]


FIRST, SECOND = told(*PIECES[0].logprobs), told(*PIECES[1].logprobs)


def typed(text: str) -> list[dict[str, Any]]:
    events = [json.loads(block.partition("\ndata: ")[2]) for block in text.split("\n\n") if block]
    for event in events:
        EVENT.validate_python(event)
    return events


async def stream(client, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post(RESPONSES, json={**ASK, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    return typed(answer.text)


async def test_official_client_gets_them(official, turns):
    response = await official.responses.create(**ASK)
    [part] = response.output[0].content
    assert [(one.token, one.logprob) for one in part.logprobs] == [
        ("Hello", -0.25),
        (" w\ufffd", -0.5),
        ("\ufffd", -0.125),
    ]
    assert [one.bytes for one in part.logprobs] == [list(b"Hello"), list(b" w\xc3"), [0xB6]]
    assert [(top.token, top.logprob) for top in part.logprobs[0].top_logprobs] == [("Hello", -0.25), ("\ufffd", -9.0)]
    assert (part.text, response.top_logprobs) == ("Hello w\u00f6", 2)
    assert turns.requests[0].sampling["logprobs"] == 2
    assert await official.responses.retrieve(response.id, include=[INCLUDE]) == response


async def test_every_event_of_text_has_its_own(client):
    events = await stream(client)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [event["logprobs"] for event in deltas] == [FIRST, SECOND]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == FIRST + SECOND
    [part] = events[-1]["response"]["output"][0]["content"]
    assert part["logprobs"] == FIRST + SECOND
    Response.model_validate(events[-1]["response"])
    [added] = [event for event in events if event["type"] == "response.content_part.added"]
    assert added["part"]["logprobs"] == []
    # They are kept: whoever reads again, from anywhere, gets the same.
    for number in range(len(events)):
        path = f"{RESPONSES}/{events[0]['response']['id']}?stream=true&starting_after={number}&include[]={INCLUDE}"
        assert typed((await client.get(path)).text) == events[number + 1 :]


async def test_official_client_collects_streamed_ones(official):
    async with official.responses.stream(**ASK) as managed:
        async for _ in managed:
            pass
        response = await managed.get_final_response()
    assert [one.token for one in response.output[0].content[0].logprobs] == ["Hello", " w\ufffd", "\ufffd"]


async def test_beside_calls_those_of_the_text_are_told(client, turns):
    turns.script = script((PIECES[0], *CALLS))
    tools = [{"type": "function", "name": "now"}]
    events = await stream(client, tools=tools)
    message, call = events[-1]["response"]["output"]
    assert message["content"][0]["logprobs"] == FIRST
    assert (call["name"], call["arguments"]) == ("now", "{}")


async def test_without_being_asked_there_are_none(client, turns):
    turns.script = script(("Hello",))
    for fields in ({"include": [], "top_logprobs": 0}, {"include": [], "top_logprobs": None}):
        answer = await client.post(RESPONSES, json={**ASK, **fields})
        assert answer.json()["output"][0]["content"][0]["logprobs"] == []
        assert turns.requests[-1].sampling["logprobs"] is None
    await client.post(RESPONSES, json={**ASK, "top_logprobs": None})
    assert turns.requests[-1].sampling["logprobs"] == 0


async def test_a_conversation_holds_what_was_said_and_not_how_likely_it_was(client):
    conversation = (await client.post("/v1/conversations", json={})).json()["id"]
    answer = await client.post(RESPONSES, json={**ASK, "conversation": conversation})
    assert answer.json()["output"][0]["content"][0]["logprobs"] == FIRST + SECOND
    items = (await client.get(f"/v1/conversations/{conversation}/items")).json()["data"]
    assert items[0]["content"] == [{"type": "output_text", "text": "Hello w\u00f6", "annotations": [], "logprobs": []}]


async def test_a_reply_is_sent_back_with_them(official, turns):
    first = await official.responses.create(**ASK, store=False)
    history = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output)]
    second = await official.responses.create(**ASK | {"input": [*history, {"role": "user", "content": "More"}]})
    assert [message["content"] for message in turns.requests[1].messages] == ["Hi", "Hello w\u00f6", "More"]
    listed = [item async for item in official.responses.input_items.list(second.id, order="asc")]
    assert listed[1].content[0].logprobs == []
