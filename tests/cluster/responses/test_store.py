"""The store of responses and conversations on the disk: what lasts, what expires, and that nothing is left of it."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import Conversation, Item, NewResponse, Page, Response, ResponseUsage
from phi_cluster.cluster.responses.database import MIGRATIONS, ResponseDatabase
from phi_cluster.cluster.responses.sqlite_conversations import SQLiteConversations
from phi_cluster.cluster.responses.sqlite_responses import SQLiteResponses
from phi_cluster.cluster.responses.store import Begun, Progress
from phi_cluster.cluster.session.journal import JournalCorrupt, JournalTooNew, JournalUnavailable
from phi_cluster.cluster.turn_api import WantedFormat

ME, OTHER = ProcessId(1, 1), ProcessId(2, 2)


class Store:
    """Both stores over one file, and short ways to use them."""

    def __init__(self, folder: Path):
        self.database = ResponseDatabase(folder)
        self.responses = SQLiteResponses(self.database)
        self.conversations = SQLiteConversations(self.database)
        self._count = 0

    def new(self, text: str = "Hi", **fields: Any) -> NewResponse:
        self._count += 1
        defaults: dict[str, Any] = {
            "tenant": "t",
            "request_id": f"{self._count:032x}",
            "input": [message(f"msg_{self._count}", text)],
            "settings": {"metadata": {"k": text}},
            "sampling": {"temperature": 0.5, "logit_bias": {5: 1.0}, "stop_token_ids": (3,)},
        }
        return NewResponse(**(defaults | fields))

    def begin(self, text: str = "Hi", now: float = 100.0, **fields: Any) -> Begun:
        return self.responses.begin(self.new(text, **fields), now, ME, "claim")

    def make(self, text: str = "Hi", reply: str = "Hello", now: float = 100.0, **fields: Any) -> Response:
        begun = self.begin(text, now, **fields)
        response = Response(begun.response.asked, now, "completed", (reply,), ResponseUsage(1, 2, 3), ended_at=now)
        assert self.responses.end(response, "claim")
        return response

    def bytes(self) -> bytes:
        """All that is on the disk."""
        return b"".join(path.read_bytes() for path in self.database.path.parent.iterdir())


def message(item_id: str, text: str) -> Item:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "id": item_id, "role": "user", "status": "completed", "content": content}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state")
    yield store
    store.database.close()


def texts(items: list[Item]) -> list[str]:
    return [item["content"][0]["text"] for item in items]


def test_what_was_asked_comes_back_as_it_was(store, tmp_path):
    wanted = WantedFormat("text.format.schema", "json_schema", {"maximum": 10**40, "enum": ["a\ud800b"]})
    asked = store.new("a\ud800b", stop=("x",), truncate=True, background=True, wanted_format=wanted)
    store.responses.begin(asked, 100.5, ME, "claim")
    other = Store(tmp_path / "state")
    [unfinished] = other.responses.unfinished()
    assert (unfinished.owner, unfinished.claim) == (ME, "claim")
    taken = other.responses.take(unfinished, OTHER, "other")
    assert taken is not None
    again = taken.response.asked
    assert again.input == asked.input
    assert again.wanted_format == wanted
    assert again.sampling == asked.sampling | {"stop_token_ids": [3]}
    assert (again.stop, again.truncate, again.background, again.settings) == (("x",), True, True, asked.settings)
    assert (taken.response.created_at, taken.response.status, taken.session_id) == (100.5, "queued", asked.id)
    other.database.close()


def test_the_file_is_ours_alone(store):
    store.make()
    path = store.database.path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}


def test_a_claim_that_was_taken_over_is_worth_nothing(store):
    response = store.begin(background=True).response
    [unfinished] = store.responses.unfinished()
    assert store.responses.take(unfinished, OTHER, "other") is not None
    # Only one of those who try gets it.
    assert store.responses.take(unfinished, OTHER, "third") is None

    def progress(claim: str, *pieces: str, first: int = 0) -> Progress:
        return Progress("t", response.id, claim, True, first, pieces)

    assert store.responses.save([progress("claim", "x"), progress("other", "a", "b")]) == ["lost", "goes on"]
    assert store.responses.save([progress("other", "c", first=2)]) == ["goes on"]
    assert store.responses.find("t", response.id).pieces == ("a", "b", "c")
    assert store.responses.find("t", response.id, 2).pieces == ("c",)
    assert store.responses.find("t", response.id).status == "in_progress"
    over = Response(response.asked, 100.0, "completed", ("a", "b", "c", "d"), ended_at=101.0)
    assert not store.responses.end(over, "claim")
    store.responses.drop("t", response.id, "claim")
    store.responses.wish_cancelled("t", response.id)
    assert store.responses.save([progress("other")]) == ["to be cancelled"]
    assert store.responses.end(over, "other")
    assert store.responses.save([progress("other")]) == ["lost"]
    assert not store.responses.end(over, "other")
    found = store.responses.find("t", response.id)
    assert (found.status, "".join(found.pieces), found.ended_at) == ("completed", "abcd", 101.0)
    assert store.responses.unfinished() == []


def test_what_is_too_old_expires_unless_something_goes_on_from_it(store):
    kept = store.make("canary-kept-1", now=100.0)
    last = store.make("canary-kept-2", now=300.0, previous_response_id=kept.id)
    old = store.make("canary-old-1", now=100.0)
    older = store.make("canary-old-2", now=110.0, previous_response_id=old.id)
    branch = store.make("canary-old-3", now=120.0, previous_response_id=kept.id)
    for conversation, used in (("conv_old", 100.0), ("conv_new", 300.0)):
        store.conversations.create("t", Conversation(conversation, 100.0, {}), [message("m", f"canary-{conversation}")])
        store.conversations.update("t", conversation, {}, used)
    held = store.make("canary-held", now=100.0, conversation_id="conv_new")
    running = store.begin("canary-running", now=100.0).response
    store.responses.expire(200.0)
    store.responses.clean()
    for gone in (old, older, branch, held):
        with pytest.raises(NotFound):
            store.responses.find("t", gone.id)
    for there in (kept, last, running):
        assert store.responses.find("t", there.id)
    with pytest.raises(NotFound):
        store.conversations.find("t", "conv_old")
    # What was said in a conversation is the conversation's.
    page = store.conversations.items("t", "conv_new", Page(ascending=True))
    assert texts(page.items) == ["canary-conv_new", "canary-held", "Hello"]
    assert {name for _, name in store.responses.doomed_sessions()} == {old.id, branch.id, "conv_old"}
    left = store.bytes()
    assert b"canary-old" not in left
    assert b"canary-conv_old" not in left
    assert b"canary-kept-1" in left
    store.responses.expire(1e9)
    store.responses.clean()
    assert b"canary-kept" not in store.bytes()
    assert b"canary-running" in store.bytes()


def test_much_expires_in_parts(store):
    for _ in range(5):
        last = store.make(now=100.0)
        for _ in range(3):
            last = store.make(now=100.0, previous_response_id=last.id)
    responses = SQLiteResponses(store.database, expired_at_once=9)
    assert [responses.expire(200.0) for _ in range(3)] == [True, True, False]
    with store.database.transaction(write=False) as connection:
        assert connection.execute("SELECT count(*) FROM responses").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM items").fetchone() == (0,)
    assert len(store.responses.doomed_sessions()) == 5


@pytest.mark.parametrize("seed", range(12))
def test_of_much_that_is_deleted_no_byte_is_left(store, seed):
    """Short and long texts, in chains and conversations, deleted in any order among others that stay."""
    rng = random.Random(seed)
    made: list[tuple[str, Response]] = []
    for number in range(120):
        word = f"canary-{number:03}-"
        text = word * rng.choice([1, 3, 40, 400, 3000 if number % 20 == 0 else 2])
        previous = rng.choice(made)[1].id if made and rng.random() < 0.5 else None
        made.append((word, store.make(text, reply=text.upper(), previous_response_id=previous)))
        if rng.random() < 0.2:
            name = f"conv_{number}"
            store.conversations.create("t", Conversation(name, 100.0, {"k": text[:500]}), [message("m", text)])
            store.conversations.delete("t", name)
    rng.shuffle(made)
    gone, there = made[:90], made[90:]
    for _, response in gone:
        store.responses.delete("t", response.id)
    store.responses.clean()
    left = store.bytes()
    assert not [word for word, _ in gone if word.encode() in left or word.upper().encode() in left]
    assert not [word for word, _ in there if word.encode() not in left]


def test_a_refused_response_leaves_no_session(store):
    first = store.make()
    store.begin(previous_response_id=first.id)
    store.responses.drop("t", f"resp_{2:032x}", "claim")
    assert store.responses.doomed_sessions() == []
    refused = store.begin().response
    store.responses.drop("t", refused.id, "claim")
    assert store.responses.doomed_sessions() == [("t", refused.id)]
    store.responses.spare("t", refused.id)
    assert store.responses.doomed_sessions() == []


def test_the_context_is_what_was_said_on_the_way(store):
    one = store.make("1", "a")
    two = store.make("2", "b", previous_response_id=one.id)
    three = store.make("3", "c", previous_response_id=two.id)
    side = store.make("4", "d", previous_response_id=one.id)
    for previous, expected in ((three, "1a2b3c"), (two, "1a2b"), (side, "1a4d")):
        begun = store.responses.begin(store.new(store=False, previous_response_id=previous.id), 1.0, ME, "c")
        assert "".join(texts(begun.context)) == expected
    store.responses.delete("t", two.id)
    begun = store.begin(previous_response_id=three.id)
    assert "".join(texts(begun.context)) == "1a3c"
    # What two said was in three's session too.
    assert store.responses.doomed_sessions() == [("t", one.id)]


def test_an_items_page_ends_where_it_says(store):
    items = [message(f"m{number}", str(number)) for number in range(7)]
    store.conversations.create("t", Conversation("c", 1.0, {}), items)
    for ascending in (True, False):
        read: list[str] = []
        after = None
        while True:
            page = store.conversations.items("t", "c", Page(3, after, ascending))
            read += texts(page.items)
            if not page.has_more:
                break
            after = page.items[-1]["id"]
        assert read == sorted(read, reverse=not ascending)
        assert len(read) == 7
    with pytest.raises(NotFound):
        store.conversations.items("t", "c", Page(after="nothing"))
    with pytest.raises(NotFound):
        store.conversations.items("other", "c", Page())


def test_what_the_disk_does_is_a_typed_error(store, tmp_path):
    store.make()
    store.database.close()
    path = store.database.path
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(JournalTooNew):
        store.responses.unfinished()
    os.truncate(path, 50)
    with pytest.raises(JournalCorrupt):
        store.responses.unfinished()
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(JournalCorrupt):
        store.responses.unfinished()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JournalUnavailable):
        Store(blocked).responses.unfinished()
