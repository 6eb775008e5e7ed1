"""Tokens to look at: what is asked of the tokenizer, and what is refused."""

from __future__ import annotations

import pytest

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "ab"}, "<ab>"),
        ({"prompt": "ab", "add_special_tokens": False}, "ab"),
        ({"prompt": ""}, "<>"),
        ({"messages": MESSAGES}, "Hi|Yo+"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "<Hi|Yo+>"),
        ({"messages": MESSAGES, "add_generation_prompt": False}, "Hi|Yo"),
        ({"messages": MESSAGES, "continue_final_message": True, "model": "phi"}, "Hi|Yo"),
    ],
)
async def test_tokenize(client, turns, body, text):
    response = await client.post("/tokenize", json=body)
    assert response.status_code == 200
    ids = list(map(ord, text))
    assert response.json() == {"count": len(ids), "max_model_len": 128, "tokens": ids, "token_strs": None}
    # Nothing is computed.
    assert turns.requests == []


async def test_tokens_by_name(client):
    response = await client.post("/tokenize", json={"prompt": "a", "return_token_strs": True})
    assert response.json()["token_strs"] == ["U+3c", "U+61", "U+3e"]


async def test_detokenize(client):
    response = await client.post("/detokenize", json={"tokens": [72, 105], "model": "org/phi-alias"})
    assert response.json() == {"prompt": "Hi"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES[:1], "continue_final_message": True}, 400, "continue_final_message"),
        (
            "/tokenize",
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            400,
            "continue_final_message",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "refused"}], "add_generation_prompt": False},
            400,
            "messages",
        ),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ x }}"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "session": 1}, 400, "session"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, 400, "tokens"),
        ("/detokenize", {"tokens": "ab"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1000]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "gpt-4"}, 404, "model"),
    ],
)
async def test_bad_input(client, path, body, status, param):
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


async def test_keys_are_asked_for(make_app, settings, connect, keys):
    app = make_app(settings, keys=keys)
    assert b"invalid_api_key" in await connect("/tokenize", {"prompt": "a"}, over=app).until(b"}")
    told = connect("/tokenize", {"prompt": "a"}, over=app, headers={"authorization": "Bearer phi-bob"})
    assert b'"count":3' in await told.until(b"count")
