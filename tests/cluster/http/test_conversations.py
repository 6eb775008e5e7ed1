"""Conversations as the official client and curl see them, and responses that become a part of them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItemList, Message

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.turn_api import Position, TextDelta, TurnStarted

CONVERSATIONS = "/v1/conversations"
REPLY = ("assistant", "Hello, wörld")


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text}


async def make(client, **fields) -> str:
    answer = await client.post(CONVERSATIONS, json=fields)
    assert answer.status_code == 200, answer.text
    checked = Conversation.model_validate(answer.json())
    assert not checked.model_extra
    return checked.id


async def texts(client, conversation_id: str) -> list[tuple[str, str]]:
    answer = await client.get(f"{CONVERSATIONS}/{conversation_id}/items", params={"limit": 100, "order": "asc"})
    assert answer.status_code == 200, answer.text
    listed = ConversationItemList.model_validate(answer.json())
    found = []
    for item in listed.data:
        assert isinstance(item, Message)
        assert not item.model_extra
        found.append((item.role, item.content[0].text))
    return found


async def respond(client, conversation: Any, text: str, **fields) -> dict[str, Any]:
    answer = await client.post("/v1/responses", json={"input": text, "conversation": conversation, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(turn) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in turn.messages]


async def test_the_official_client_keeps_a_conversation(official, turns):
    conversation = await official.conversations.create(metadata={"topic": "demo"}, items=[user("Hi")])
    assert conversation.id.startswith("conv_")
    assert (await official.conversations.retrieve(conversation.id)).metadata == {"topic": "demo"}
    updated = await official.conversations.update(conversation.id, metadata={"topic": "other"})
    assert updated.metadata == {"topic": "other"}
    added = await official.conversations.items.create(conversation.id, items=[user("More"), user("Still")])
    assert [item.content[0].text for item in added.data] == ["More", "Still"]
    listed = [item async for item in official.conversations.items.list(conversation.id, limit=2)]
    assert [item.content[0].text for item in listed] == ["Still", "More", "Hi"]
    one = await official.conversations.items.retrieve(listed[0].id, conversation_id=conversation.id)
    assert one.content[0].text == "Still"
    await official.conversations.items.delete(listed[0].id, conversation_id=conversation.id)
    with pytest.raises(openai.NotFoundError):
        await official.conversations.items.retrieve(listed[0].id, conversation_id=conversation.id)
    response = await official.responses.create(model="phi", input="Go on", conversation=conversation.id)
    assert response.conversation.id == conversation.id
    assert said(turns.requests[0]) == [("user", "Hi"), ("user", "More"), ("user", "Go on")]
    gone = await official.conversations.delete(conversation.id)
    assert (gone.deleted, gone.object) == (True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError):
        await official.conversations.retrieve(conversation.id)


async def test_a_conversation_is_one_session(client, turns):
    name = await make(client, items=[{"role": "developer", "content": "Be nice"}])
    await respond(client, name, "One", instructions="Be brief")
    await respond(client, {"id": name}, "Two", stream=False)
    assert [turn.session_id for turn in turns.requests] == [name, name]
    assert said(turns.requests[0]) == [("system", "Be brief"), ("system", "Be nice"), ("user", "One")]
    assert said(turns.requests[1]) == [("system", "Be nice"), ("user", "One"), REPLY, ("user", "Two")]
    assert await texts(client, name) == [("developer", "Be nice"), ("user", "One"), REPLY, ("user", "Two"), REPLY]


async def test_pages(client):
    name = await make(client, items=[user(str(number)) for number in range(20)])
    page = (await client.get(f"{CONVERSATIONS}/{name}/items")).json()
    assert [item["content"][0]["text"] for item in page["data"]] == [str(number) for number in range(19, -1, -1)]
    assert (page["has_more"], page["last_id"]) == (False, page["data"][-1]["id"])
    after = page["data"][2]["id"]
    page = (await client.get(f"{CONVERSATIONS}/{name}/items", params={"after": after, "limit": 3})).json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["16", "15", "14"]
    assert page["has_more"] is True
    empty = await make(client)
    page = (await client.get(f"{CONVERSATIONS}/{empty}/items")).json()
    assert page == {"object": "list", "data": [], "has_more": False, "first_id": "", "last_id": ""}
    ConversationItemList.model_validate(page)


async def test_one_response_at_a_time(client, connect, turns):
    name = await make(client)
    rest = turns.script[2:]
    turns.script[2:] = [asyncio.Event()]
    connection = connect("/v1/responses", {"input": "One", "conversation": name, "stream": True})
    await connection.until(b"Hello")
    busy = await client.post("/v1/responses", json={"input": "Two", "conversation": name})
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "conversation_locked")
    connection.disconnect()
    await connection.finished()
    # What the client has seen is a part of the conversation.
    turns.script[2:] = rest
    await respond(client, name, "Two")
    expected = [("user", "One"), ("assistant", "Hello"), ("user", "Two"), REPLY]
    assert await texts(client, name) == expected


async def test_what_failed_without_a_word_is_no_part_of_it(client, turns):
    name = await make(client)
    turns.script = [Overloaded("no room")]
    assert (await client.post("/v1/responses", json={"input": "One", "conversation": name})).status_code == 429
    assert await texts(client, name) == []
    turns.script = [TurnStarted(1, 0), TextDelta("Hel", 1, Position(1, 1)), Overloaded("gone")]
    assert (await client.post("/v1/responses", json={"input": "One", "conversation": name})).status_code == 429
    assert await texts(client, name) == [("user", "One"), ("assistant", "Hel")]


async def test_a_chain_may_leave_a_conversation(client, turns, sessions):
    name = await make(client, items=[user("Hi")])
    first = await respond(client, name, "One")
    await respond(client, name, "Two")
    answer = await client.post("/v1/responses", json={"input": "Else", "previous_response_id": first["id"]})
    body = answer.json()
    assert (body["conversation"], turns.requests[-1].session_id) == (None, body["id"])
    assert said(turns.requests[-1]) == [("user", "Hi"), ("user", "One"), REPLY, ("user", "Else")]
    assert [(one[1].session_id, one[1].num_turns) for one in sessions.branches] == [(name, 1)]
    assert len(await texts(client, name)) == 5


async def test_deleted_is_gone_to_the_last_byte(client, sessions, tmp_path):
    name = await make(client, items=[user("canary-one " * 300)], metadata={"k": "canary-two"})
    sessions.add("default", name)
    body = (await client.delete(f"{CONVERSATIONS}/{name}")).json()
    assert not ConversationDeletedResource.model_validate(body).model_extra
    assert body == {"id": name, "object": "conversation.deleted", "deleted": True}
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"canary" not in files
    assert sessions.known == {}
    assert (await client.delete(f"{CONVERSATIONS}/{name}")).status_code == 404


async def test_a_deleted_item_goes_from_the_session_too(client, turns, sessions, tmp_path):
    name = await make(client, items=[user("canary-one"), user("Stay")])
    sessions.add("default", name)
    page = (await client.get(f"{CONVERSATIONS}/{name}/items", params={"order": "asc"})).json()
    answer = await client.delete(f"{CONVERSATIONS}/{name}/items/{page['first_id']}")
    assert answer.json()["object"] == "conversation"
    assert sessions.known == {}
    assert b"canary" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    await respond(client, name, "One")
    assert said(turns.requests[0]) == [("user", "Stay"), ("user", "One")]


async def test_another_key_finds_nothing(client):
    name = await make(client, items=[user("Hi")])
    item = (await client.get(f"{CONVERSATIONS}/{name}/items")).json()["first_id"]
    unknown, other = "conv_" + "0" * 32, {"authorization": "Bearer other"}
    asked: list[tuple[str, str, Any]] = [
        ("GET", "", None),
        ("POST", "", {"metadata": {}}),
        ("DELETE", "", None),
        ("GET", "/items", None),
        ("POST", "/items", {"items": [user("x")]}),
        ("GET", f"/items/{item}", None),
        ("DELETE", f"/items/{item}", None),
    ]
    for method, path, body in asked:
        theirs = await client.request(method, f"{CONVERSATIONS}/{name}{path}", json=body, headers=other)
        nobodys = await client.request(method, f"{CONVERSATIONS}/{unknown}{path}", json=body)
        assert theirs.status_code == nobodys.status_code == 404, (method, path)
        assert theirs.text.replace(name, "ID") == nobodys.text.replace(unknown, "ID")
    answer = await client.post("/v1/responses", json={"input": "x", "conversation": name}, headers=other)
    assert answer.status_code == 404
    assert await texts(client, name) == [("user", "Hi")]


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "", {"items": [user("x")] * 21}, "items"),
        ("POST", "", {"items": "x"}, "items"),
        ("POST", "", {"metadata": 5}, "metadata"),
        ("POST", "", {"name": "x"}, "name"),
        ("POST", "/NAME", {}, "metadata"),
        ("POST", "/NAME/items", {"items": []}, "items"),
        ("POST", "/NAME/items", {"items": [{"type": "item_reference", "id": "msg_1"}]}, "items[0].type"),
        (
            "POST",
            "/NAME/items",
            {"items": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "items[0].content",
        ),
        ("GET", "/NAME?x=1", None, "x"),
        ("GET", "/NAME/items?limit=1000", None, "limit"),
        ("GET", "/NAME/items?include[]=message.output_text.logprobs", None, "include"),
    ],
)
async def test_bad_input_is_named(client, method, path, body, param):
    name = await make(client)
    answer = await client.request(method, CONVERSATIONS + path.replace("NAME", name), json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
