"""Which sessions there are, and which unnamed conversation a request goes on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from phi_cluster.cluster.messages import BeginTurn, SessionKey
from phi_cluster.cluster.session.journal import MemoryJournal
from phi_cluster.cluster.session.roster import Entry, Roster
from phi_cluster.cluster.session.session import Session, SessionSettings


class Sessions:
    """Opens sessions, and remembers which."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self.opened: list[Session] = []

    def __call__(self, key: SessionKey) -> Session:
        journal = MemoryJournal(key, self._settings.fingerprint, self._settings.clock)
        self.opened.append(Session.restore(journal, self._settings, activate=False))
        return self.opened[-1]


@pytest.fixture
def sessions(settings: SessionSettings) -> Sessions:
    return Sessions(settings)


@pytest.fixture
def roster(sessions: Sessions) -> Roster:
    return Roster(sessions, max_ephemeral=2)


@pytest.fixture
def say(turns: Any) -> Callable[..., Any]:
    """`say(entry, text)`: a turn after which the session holds exactly this text, one token a character. Its reply is
    the part behind the last `>`."""

    async def run(entry: Entry, text: str) -> None:
        assert entry.session is not None
        grant = await turns.begin(entry.session, text)
        token_ids = list(range(grant.num_kept_chars, len(text)))
        turns.write(grant, token_ids)
        prompt_end = text.rindex(">") + 1
        message = turns.message(grant, text, token_ids)
        boundaries = ((prompt_end, prompt_end), (len(text), len(text)))
        entry.session.commit(replace(message, boundaries=boundaries))

    return run


def test_a_session_is_opened_once(roster: Roster, sessions: Sessions) -> None:
    key = SessionKey("t", "a")
    assert roster.find(key) is None
    assert not roster.is_known(key)
    entry = roster.open(key)
    assert roster.open(key) is entry
    assert roster.find(key) is entry
    assert entry.session is sessions.opened[0]
    assert len(sessions.opened) == 1
    assert list(roster) == [entry]
    assert roster.is_known(key)


def test_tenants_do_not_see_each_other(roster: Roster) -> None:
    mine = roster.open(SessionKey("mine", "a"))
    roster.add_stored(SessionKey("theirs", "b"))
    assert roster.open(SessionKey("theirs", "a")) is not mine
    assert sorted(roster.named("mine")) == ["a"]
    assert sorted(roster.named("theirs")) == ["a", "b"]
    assert sorted(roster.named("nobody")) == []
    assert not roster.is_known(SessionKey("mine", "b"))


def test_stored_sessions_are_known_but_not_in_memory(roster: Roster, sessions: Sessions) -> None:
    key = SessionKey("t", "stored")
    roster.add_stored(key)
    assert roster.is_known(key)
    assert roster.find(key) is None
    assert sessions.opened == []
    assert list(roster.stored_keys()) == [key]
    roster.open(key)
    assert list(roster.stored_keys()) == [key]


def test_names_are_sorted(roster: Roster) -> None:
    for name in ("b", "a10", "a2", "B"):
        roster.add_stored(SessionKey("t", name))
    assert sorted(roster.named("t")) == ["B", "a10", "a2", "b"]


def test_a_forgotten_session_is_still_stored_unless_it_was_deleted(roster: Roster) -> None:
    key = SessionKey("t", "a")
    first = roster.open(key)
    roster.forget(first, deleted=False)
    assert roster.find(key) is None
    assert roster.is_known(key)
    second = roster.open(key)
    assert second is not first
    roster.forget(second, deleted=True)
    assert not roster.is_known(key)
    assert list(roster.stored_keys()) == []
    # Twice does no harm.
    roster.forget(second, deleted=True)


def test_unnamed_conversations_have_no_name(roster: Roster) -> None:
    entry = roster.continue_or_open("t", "hello>")
    assert entry.key.ephemeral
    assert sorted(roster.named("t")) == []
    assert list(roster.stored_keys()) == []
    assert roster.find(entry.key) is entry
    # A named one that happens to be called the same is another.
    named = SessionKey("t", entry.key.session_id)
    assert not roster.is_known(named)
    roster.add_stored(named)
    roster.forget(entry, deleted=True)
    assert roster.is_known(named)
    assert not roster.is_known(entry.key)


def test_an_adopted_entry_is_found(roster: Roster, sessions: Sessions) -> None:
    entry = Entry(SessionKey("t", "a"), actor=object())
    roster.adopt(entry)
    assert roster.open(entry.key) is entry
    assert sorted(roster.named("t")) == ["a"]
    assert sessions.opened == []


async def test_a_request_goes_on_with_the_conversation_that_it_repeats(roster: Roster, say: Callable[..., Any]) -> None:
    first = roster.continue_or_open("t", "one>")
    await say(first, "one>1.")
    second = roster.continue_or_open("t", "two>")
    assert second is not first
    await say(second, "two>2.")
    assert roster.continue_or_open("t", "one>1.more>") is first
    assert roster.continue_or_open("t", "two>2.more>") is second
    # The same prompt once more: the last reply is tried again.
    assert roster.continue_or_open("t", "one>") is first
    # Nobody else's.
    assert roster.continue_or_open("other", "one>1.more>") not in (first, second)


async def test_who_shares_only_a_beginning_takes_nobodys_cache(roster: Roster, say: Callable[..., Any]) -> None:
    entry = roster.continue_or_open("t", "system.hi>")
    await say(entry, "system.hi>hello.")
    await say(entry, "system.hi>hello.how>fine.")
    # A boundary of the conversation is in it, but not all up to its last reply.
    assert roster.continue_or_open("t", "system.hi>hello.other>") is not entry
    assert roster.continue_or_open("t", "system.hi>hello.how>fine.and>") is entry


async def test_of_two_that_fit_the_longer_one_goes_on(roster: Roster, say: Callable[..., Any]) -> None:
    short, long = roster.continue_or_open("t", "a>"), roster.continue_or_open("t", "a>")
    assert short is not long
    await say(short, "a>1.")
    await say(long, "a>1.b>2.")
    assert roster.continue_or_open("t", "a>1.b>2.c>") is long
    assert roster.continue_or_open("t", "a>1.x>") is short


async def test_a_conversation_in_a_turn_is_not_taken(roster: Roster, say: Callable[..., Any]) -> None:
    entry = roster.continue_or_open("t", "a>")
    await say(entry, "a>1.")
    assert entry.session is not None
    grant = await entry.session.begin_turn(BeginTurn(entry.key, "r2", "a>1.b>"))
    assert roster.continue_or_open("t", "a>1.b>") is not entry
    entry.session.abandon(grant.epoch)  # type: ignore[union-attr]
    assert roster.continue_or_open("t", "a>1.b>") is entry


async def test_named_sessions_are_never_taken_for_unnamed_requests(roster: Roster, say: Callable[..., Any]) -> None:
    named = roster.open(SessionKey("t", "demo"))
    await say(named, "a>1.")
    assert roster.continue_or_open("t", "a>1.b>").key.ephemeral


async def test_surplus_conversations_go_longest_idle_first(roster: Roster, say: Callable[..., Any], clock: Any) -> None:
    entries = []
    for text in ("a>", "b>", "c>", "d>"):
        entry = roster.continue_or_open("t", text)
        await say(entry, f"{text}1.")
        entries.append(entry)
        clock.now += 1.0
    roster.open(SessionKey("t", "named"))
    assert roster.surplus_ephemeral() == entries[:2]
    assert entries[0].session is not None
    grant = await entries[0].session.begin_turn(BeginTurn(entries[0].key, "r2", "a>1.b>"))
    assert roster.surplus_ephemeral() == entries[1:3]
    entries[0].session.abandon(grant.epoch)  # type: ignore[union-attr]
    for entry in entries[:2]:
        roster.forget(entry, deleted=True)
    assert roster.surplus_ephemeral() == []


async def test_a_request_that_reads_on_finds_its_conversation(roster: Roster, turns: Any) -> None:
    """Among several that a prompt could go on with, also while its turn is under way."""
    entries = []
    for name in ("a", "b"):
        entry = roster.continue_or_open("t", "same>")
        assert entry.session is not None
        entries.append((entry, await turns.begin(entry.session, "same>", name)))
    (first, grant), (second, _) = entries
    assert first is not second
    assert roster.left_by("t", "b") is second
    turns.write(grant, [1])
    assert first.session is not None
    first.session.commit(turns.message(grant, "same>x", [1], "a"))
    assert roster.left_by("t", "a") is first
    assert roster.left_by("t", "c") is None
    assert roster.left_by("other", "a") is None


async def test_of_two_that_fit_equally_the_one_with_the_same_hint_goes_on(
    roster: Roster, say: Callable[..., Any]
) -> None:
    """Two identical conversations at once: each client comes back to its own."""
    entries = []
    for hint in ("one", "two", None):
        entries.append(roster.open(SessionKey("a", f"c{hint}", ephemeral=True)))
        entries[-1].cache_hint = hint
        await say(entries[-1], "hello you>I am")
    for hint, entry in (("two", entries[1]), ("one", entries[0]), ("two", entries[1])):
        assert roster.continue_or_open("a", "hello you>I am and more", hint) is entry
    # A hint alone finds nothing, and it is not another tenant's.
    assert roster.continue_or_open("a", "goodbye>", "two") not in entries
    assert roster.continue_or_open("b", "hello you>I am and more", "two") not in entries
