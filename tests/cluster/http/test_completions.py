"""Completions: the prompt's forms, and the replies as the official client sees them."""

import pytest


async def test_official_client_whole_and_streamed(official, turns):
    whole = await official.completions.create(model="org/phi-alias", prompt="Once")
    assert whole.id == f"cmpl-{turns.requests[0].request_id}"
    assert whole.object == "text_completion"
    # As vLLM: the first served name, whichever alias was asked for.
    assert whole.model == "phi"
    assert whole.choices[0].text == "Hello, wörld"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    stream = await official.completions.create(
        model="phi", prompt="Once", stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == ["Hello", ", wörld", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert last.choices == []
    assert last.usage.total_tokens == 12


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("Once", "Once"),
        (["Once"], "Once"),
        ([1, 0, 999], [1, 0, 999]),
        ([[1, 2]], [1, 2]),
    ],
)
async def test_forms_of_the_prompt(client, turns, given, prompt):
    assert (await client.post("/v1/completions", json={"prompt": given})).status_code == 200
    [turn] = turns.requests
    assert turn.prompt == prompt
    assert turn.messages is None


async def test_max_tokens_is_16_as_everywhere(client, turns):
    await client.post("/v1/completions", json={"prompt": "a"})
    await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 100})
    assert [turn.sampling["max_tokens"] for turn in turns.requests] == [16, 100]


async def test_fields_that_ask_for_nothing_are_accepted(client):
    body = {"prompt": "a", "echo": False, "suffix": "", "best_of": 1, "logprobs": None, "n": 1, "user": "u"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_a_prompt_of_ids_beyond_the_context_says_by_how_much(client, turns):
    assert (await client.post("/v1/completions", json={"prompt": [1] * 127})).status_code == 200
    response = await client.post("/v1/completions", json={"prompt": [1] * 130})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "3 too many" in error["message"]
    assert len(turns.requests) == 1
