"""Chat completions as the official client and curl see them."""

import json

import openai
import pytest

from phi_cluster.cluster.errors import ContextOverflow, Overloaded, SessionBusy
from phi_cluster.cluster.turn_api import Position, TextDelta, TurnFinished, TurnStarted

HELLO = [{"role": "user", "content": "Hi"}]


async def test_official_client_gets_a_whole_reply(official, turns):
    reply = await official.chat.completions.create(model="phi", messages=HELLO)
    assert reply.id == f"chatcmpl-{turns.requests[0].request_id}"
    assert reply.object == "chat.completion"
    assert reply.model == "phi"
    assert reply.created == 1_750_000_000
    assert reply.system_fingerprint == "fp_test"
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hello, wörld"
    assert choice.finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 5, 12)
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert turns.ends == ["completed"]


async def test_a_clients_trace_is_gone_on_with(client, turns):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asked = {"model": "phi", "input": "Hi", "messages": HELLO, "prompt": "Hi"}
    for path, name in (("chat/completions", "messages"), ("completions", "prompt"), ("responses", "input")):
        body = {"model": "phi", name: asked[name]}
        assert (await client.post(f"/v1/{path}", json=body, headers={"traceparent": trace})).status_code == 200
        assert (await client.post(f"/v1/{path}", json=body)).status_code == 200
    assert [request.traceparent for request in turns.requests] == [trace, None] * 3


async def test_official_client_streams(official, turns):
    stream = await official.chat.completions.create(model="phi", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hello", ", wörld", None]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk.id for chunk in chunks} == {f"chatcmpl-{turns.requests[0].request_id}"}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(official):
    stream = await official.chat.completions.create(
        model="phi", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *others, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert (last.usage.total_tokens, last.usage.prompt_tokens_details.cached_tokens) == (12, 3)
    assert all(chunk.usage is None for chunk in others)


async def test_usage_comes_in_every_chunk_when_asked_for_as_vllm_tells_it(official):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await official.chat.completions.create(model="phi", messages=HELLO, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    usages = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.total_tokens) for chunk in chunks]
    assert usages[0] == (7, 0, 7)
    assert usages == sorted(usages)
    # The fake turn has one token without a piece.
    assert usages[-2:] == [(7, 4, 11), (7, 5, 12)]
    assert {chunk.usage.prompt_tokens_details.cached_tokens for chunk in chunks} == {3}
    # Not without the other, as there.
    options["include_usage"] = False
    stream = await official.chat.completions.create(model="phi", messages=HELLO, stream=True, stream_options=options)
    assert {chunk.usage async for chunk in stream} == {None}


async def test_nothing_but_data_for_clients_that_take_every_line_for_json(client, events):
    body = {"messages": HELLO, "stream": True}
    whole = await client.post("/v1/chat/completions", json=body)
    plain = await client.post("/v1/chat/completions", json={**body, "stream_options": {"data_only": True}})
    assert b"\nid: " in whole.content
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in plain.content.split(b"\n\n") if block)
    said = [[c["choices"][0]["delta"] for c in events(r.content) if c["choices"]] for r in (whole, plain)]
    assert said[0] == said[1]


async def test_official_client_sends_its_history_with_our_own_message_in_it(official, turns):
    reply = await official.chat.completions.create(model="phi", messages=HELLO)
    await official.chat.completions.create(
        model="phi", messages=[*HELLO, reply.choices[0].message, {"role": "user", "content": "More"}]
    )
    assert turns.requests[1].messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, wörld"},
        {"role": "user", "content": "More"},
    ]


async def test_events_on_the_wire(client, events):
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "wörld" in response.text
    first, *_, last = events(response.text)
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


async def test_everything_given_reaches_the_runner(client, turns):
    sampling = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "seed": -(2**63),
        "min_tokens": 2,
        "ignore_eos": True,
        "logit_bias": {"999": -100, "0": 5},
        "stop_token_ids": [3, 999],
    }
    messages = [
        {"role": "developer", "content": "Be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Odalys",
        },
    ]
    response = await client.post(
        "/v1/chat/completions",
        json={**sampling, "messages": messages, "max_completion_tokens": 9, "stop": "END"},
        headers={"x-session-id": "demo:1"},
    )
    assert response.status_code == 200
    [turn] = turns.requests
    expected = {**sampling, "top_k": 0, "max_tokens": 9, "logit_bias": {999: -100.0, 0: 5.0}}
    assert turn.sampling == {**expected, "stop_token_ids": (3, 999), "logprobs": None}
    assert turn.messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "a\nb", "name": "Odalys"},
    ]
    assert turn.prompt is None
    assert turn.stop == ("END",)
    assert (turn.tenant, turn.session_id) == ("default", "demo:1")
    assert (turn.add_generation_prompt, turn.continue_final_message) == (True, False)


async def test_defaults(client, turns):
    # null is "not given".
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "seed": None, "stop": None})
    assert response.status_code == 200
    [turn] = turns.requests
    assert turn.sampling == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "max_tokens": None,
        "min_tokens": 0,
        "ignore_eos": False,
        "logit_bias": {},
        "stop_token_ids": (),
        "logprobs": None,
    }
    assert turn.stop == ()
    assert turn.session_id is None


async def test_continuing_the_last_message_begins_no_new_one(client, turns):
    messages = [*HELLO, {"role": "assistant", "content": "The capital is"}]
    body = {"messages": messages, "continue_final_message": True}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert (turns.requests[0].add_generation_prompt, turns.requests[0].continue_final_message) == (
        False,
        True,
    )


async def test_fields_that_ask_for_nothing_are_accepted(client):
    body = {
        "messages": [{**HELLO[0], "tool_calls": [], "refusal": None, "function_call": None, "audio": None}],
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "n": 1,
        "logprobs": False,
        "top_logprobs": None,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "length_penalty": 1.0,
        "skip_special_tokens": True,
    }
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_details_of_serving_only_on_request(client, turns, events):
    turns.script[-1] = TurnFinished("length", 7, 3, 5, engine_replaced=True)
    body = {"messages": HELLO}
    assert "phi" not in (await client.post("/v1/chat/completions", json=body)).json()
    asked = {"x-phi-details": "1"}
    whole = (await client.post("/v1/chat/completions", json=body, headers=asked)).json()
    # The fake clock is looked at when the request begins and at the first token.
    assert whole["phi"] == {"ttft_ms": 1000.0, "engine_replaced": True}
    assert whole["choices"][0]["finish_reason"] == "length"
    response = await client.post("/v1/chat/completions", json={**body, "stream": True}, headers=asked)
    assert [("phi" in event) for event in events(response.text)] == [False, False, False, True]
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/chat/completions", json=body, headers=asked)
    assert [("phi" in event) for event in events(response.text)] == [False, False, False, False, True]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextOverflow("3 tokens too many", param="messages"), 400, "context_length_exceeded"),
        (SessionBusy("another turn is running"), 409, "session_busy"),
        (Overloaded("no room", retry_after=2.2), 429, "overloaded"),
    ],
)
async def test_an_error_before_the_first_event_is_a_status(client, turns, stream, error, status, code):
    turns.script = [error]
    response = await client.post(
        "/v1/chat/completions", json={"messages": HELLO, "stream": stream}, headers={"x-session-id": "s"}
    )
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == error.message
    assert response.headers["x-session-id"] == "s"
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


async def test_an_error_in_mid_stream_is_an_event(client, official, turns, events):
    turns.script[2:] = [Overloaded("the engine is gone")]
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert response.status_code == 200
    *_, last = events(response.text)
    assert last == {
        "error": {
            "message": "the engine is gone",
            "type": "overloaded_error",
            "param": None,
            "code": "overloaded",
        }
    }
    stream = await official.chat.completions.create(model="phi", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="the engine is gone"):
        [chunk async for chunk in stream]


async def test_an_error_in_mid_reply_leaves_no_half_reply(client, turns):
    turns.script[2:] = [Overloaded("the engine is gone")]
    response = await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 429
    assert "Hello" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
async def test_what_nobody_expected_is_logged_and_not_told(client, turns, caplog, stream, started):
    turns.script[1 if started else 0 :] = [KeyError("/root/secret/path.py")]
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream})
    assert response.status_code == (200 if stream and started else 500)
    assert "server_error" in response.text
    assert "secret" not in response.text
    assert "KeyError" not in response.text
    assert "secret" in caplog.text
    assert turns.requests[0].request_id in caplog.text
    assert response.headers["x-request-id"] == turns.requests[0].request_id


async def test_a_turn_that_just_stops_is_an_error_too(client, turns, events):
    turns.script = [TurnStarted(1, 0), TextDelta("Hel", 1, Position(1, 1))]
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert events(response.text)[-1]["error"]["type"] == "server_error"
    assert (await client.post("/v1/chat/completions", json={"messages": HELLO})).status_code == 500


async def test_text_that_no_utf8_can_carry_does_not_break_the_stream(client, turns, events):
    turns.script[1] = TextDelta("a\ud800b", 1, Position(1, 1))
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert events(response.content)[1]["choices"][0]["delta"]["content"] == "a?b"


async def test_the_official_clients_errors_are_of_the_right_kind(official):
    with pytest.raises(openai.NotFoundError) as not_found:
        await official.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await official.chat.completions.create(model="phi", messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.body["message"] == "temperature must be at most 2, not 3"


async def test_the_runners_repr_shows_no_text(client, turns):
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "canary"}]})
    assert "canary" not in repr(turns.requests[0])
    assert json.dumps(turns.requests[0].messages)


async def test_events_with_text_have_their_position_as_id(client):
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block]
    ids = [lines[0].removeprefix("id: ") for lines in blocks if lines[0].startswith("id: ")]
    assert ids == ["1-00000abc", "4-ffffffff"]
    assert all(json.loads(lines[1].removeprefix("data: "))["choices"][0]["delta"]["content"] for lines in blocks[1:3])


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_reads_on_keeps_its_id(client, turns, stream):
    first = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream})
    request_id = first.headers["x-request-id"]
    headers = {"x-request-id": request_id, "x-resume-from": "3-00000abc", "x-session-id": "demo"}
    again = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream}, headers=headers)
    assert again.headers["x-request-id"] == request_id
    assert f"chatcmpl-{request_id}" in again.text
    assert (turns.requests[-1].request_id, turns.requests[-1].resume_from) == (request_id, Position(3, 0xABC))
    assert turns.requests[0].resume_from is None


async def test_a_clients_own_id_is_nobodys_unless_it_reads_on(client, turns):
    headers = {"x-request-id": "a" * 32}
    response = await client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
    assert response.headers["x-request-id"] == turns.requests[0].request_id != "a" * 32


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-resume-from": "0"}, "x-request-id"),
        ({"x-resume-from": "1-00000000", "x-request-id": "A" * 32}, "x-request-id"),
        ({"x-resume-from": "1-00000000", "x-request-id": "../" + "a" * 29}, "x-request-id"),
        ({"x-resume-from": "1", "x-request-id": "a" * 32}, "x-resume-from"),
        ({"x-resume-from": "-1", "x-request-id": "a" * 32}, "x-resume-from"),
        ({"x-resume-from": "9" * 30, "x-request-id": "a" * 32}, "x-resume-from"),
        ({"x-resume-from": "", "x-request-id": "a" * 32}, "x-resume-from"),
        ([("x-resume-from", "0"), ("x-resume-from", "0"), ("x-request-id", "a" * 32)], "x-resume-from"),
    ],
)
async def test_headers_that_do_not_say_what_to_read_on(client, turns, headers, param):
    response = await client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert turns.requests == []
