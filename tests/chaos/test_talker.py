"""Clients against a fake server: what they write down, how they leave, and what they do when connections break."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.chaos.checker import check
from tests.chaos.fake_server import Behaviour, said
from tests.chaos.history import Attempt, Fault, History, Ready
from tests.chaos.scripts import Script, Turn
from tests.chaos.streams import Address, Stream, ask
from tests.chaos.talker import Conversation, Patience, Talkers

TURN = Turn("How are you?", {"max_tokens": 12})
SCRIPT = Script("s0", "Zorvexlin", (TURN, Turn("And now?", {"max_tokens": 9})))


@pytest.fixture
def address(fake):
    return Address("127.0.0.1", fake.port)


@pytest.fixture
def history():
    return History(sees_positions=True)


@pytest.fixture
def talkers(address, history):
    return Talkers(address, history, Patience(attempt=1.0, repairs=0.5, again=0.01))


async def test_a_conversation_is_written_down(talkers, history, fake):
    talk = Conversation("a", SCRIPT)
    while not talk.over:
        await talkers.say_next(talk)
    history.expected = said(SCRIPT)
    first, second = history.attempts
    assert (first.ending, first.status, first.closings, first.dones, first.strays) == ("done", 200, 1, 1, 0)
    assert [event.position for event in first.events] == list(range(1, 13))
    assert (first.prompt_tokens, first.completion_tokens, first.finish_reason) == (7, 12, "length")
    assert second.text == history.expected[1].text
    assert talk.acknowledged == [0, 1]
    assert [headers["x-session-id"] for headers, _ in fake.requests] == ["a", "a"]
    assert [message["role"] for message in fake.requests[1][1]["messages"]] == ["user", "assistant", "user"]
    assert not check(history)


async def test_a_broken_connection_is_read_on_from_the_last_position(talkers, history, fake):
    fake.behaviours = [Behaviour(break_after=5), Behaviour(status=503), Behaviour(break_after=3)]
    talk = Conversation("a", SCRIPT)
    await talkers.say_next(talk)
    assert not talk.failed
    assert [attempt.ending for attempt in history.attempts] == ["broken", "refused", "broken", "done"]
    assert [attempt.resume_from for attempt in history.attempts] == [None, 5, 5, 8]
    assert len({headers.get("x-request-id") for headers, _ in fake.requests[1:]}) == 1
    assert talk.messages[-1]["content"] == said(SCRIPT)[0].text
    # Nobody had killed anything: it ought not to have broken.
    history.expected = said(SCRIPT)
    assert {breach.promise for breach in check(history)} == {"C5"}
    history.faults.append(Fault(history.attempts[0].began, "kill", "replica", died=history.attempts[0].began))
    assert not check(history)


async def test_a_request_that_broke_before_the_first_token_is_asked_again(talkers, history, fake):
    fake.behaviours = [Behaviour(break_after=0)]
    talk = Conversation("a", SCRIPT)
    await talkers.say_next(talk)
    assert [(a.ending, a.resumed) for a in history.attempts] == [("broken", None), ("done", None)]


async def test_nobody_is_patient_for_ever(talkers, history, fake):
    fake.behaviours = [Behaviour(status=503)] * 1000
    talk = Conversation("a", SCRIPT)
    await talkers.say_next(talk)
    assert talk.failed
    history.expected = said(SCRIPT)
    assert "gave up" in check(history)[-1].what
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = Talkers(Address("127.0.0.1", free.getsockname()[1]), history, Patience(1.0, 0.2, 0.01))
        talk = Conversation("b", SCRIPT)
        await nobody.say_next(talk)
    assert talk.failed
    assert history.attempts[-1].why == "ConnectionRefusedError"


@pytest.mark.parametrize(
    ("behaviour", "ending"),
    [
        (Behaviour(hang_after=2), "late"),
        (Behaviour(error_after=2), "error"),
        (Behaviour(status=422), "refused"),
        (Behaviour(strange=b"data: {}\n\n"), "done"),
    ],
    ids=["late", "error", "refused", "strays"],
)
async def test_other_ends_are_not_tried_again(behaviour, ending, talkers, history, fake):
    fake.behaviours = [behaviour]
    talk = Conversation("a", SCRIPT)
    await talkers.say_next(talk)
    assert [attempt.ending for attempt in history.attempts] == [ending]
    history.expected = said(SCRIPT)
    assert {breach.promise for breach in check(history)} == {"C5"}


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_client_that_leaves_goes_on_with_what_it_saw(how, talkers, history, fake):
    fake.gap = 0.005
    script = Script("s0", "Zorvexlin", (Turn("How are you?", {"max_tokens": 40}, cut_at=4, cut_how=how), TURN))
    expected = said(script)
    talkers.expect(expected)
    history.expected = expected
    talk = Conversation("a", script)
    await talkers.say_next(talk)
    [attempt] = history.attempts
    assert (attempt.ending, attempt.cut_by) == ("cut", "script")
    assert talk.messages[-1]["content"] == expected[0].prefixes[4]
    assert talk.acknowledged == []
    await talkers.say_next(talk)
    assert talk.acknowledged == [1]
    assert not check(history)
    await asyncio.sleep(0.02)
    # The server saw it go; behind a RST no end of file can be read.
    assert fake.left == (["FIN"] if how == "fin" else ["ConnectionResetError"]) or fake.left == ["RST"]


async def test_two_clients_ask_for_one_turn(talkers, history, fake):
    script = Script("s0", "Zorvexlin", (Turn("How are you?", {"max_tokens": 12}, twice=True),))
    talkers.expect(said(script))
    talk = Conversation("a", script)
    await talkers.say_next(talk)
    assert sorted(attempt.lane for attempt in history.attempts) == [0, 1]
    assert talk.over
    assert not talk.failed


@pytest.mark.parametrize("twice", [True, False])
async def test_one_of_two_clients_that_was_overtaken_asks_anew(twice, talkers, history, fake):
    script = Script("s0", "Zorvexlin", (Turn("How are you?", {"max_tokens": 12}, twice=twice),))
    fake.behaviours = [Behaviour(break_after=3), Behaviour(status=409, code="reply_gone")]
    talk = Conversation("a", script)
    await talkers.say_next(talk)
    assert talk.failed is not twice
    assert [attempt.resume_from for attempt in history.attempts] == [None, 3, None][: 3 if twice else 2]


async def test_a_stream_cut_by_the_nemesis_is_read_on(talkers, history, fake):
    fake.gap = 0.005
    talk = Conversation("a", SCRIPT)
    running = asyncio.create_task(talkers.say_next(talk))
    while not history.attempts or len(history.attempts[0].events) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    [stream] = talkers.open_streams
    stream.cut("rst", "nemesis")
    await running
    assert not talk.failed
    assert [attempt.ending for attempt in history.attempts] == ["cut", "done"]
    history.expected = said(SCRIPT)
    history.ready = [Ready(0.0, 200)]
    assert not check(history)


async def test_small_requests(address, fake):
    fake.behaviours = [Behaviour(status=404)]
    assert (await ask(address, "DELETE", "/v1/sessions/a")).status == 404
    assert (await ask(Address("127.0.0.1", 1), "GET", "/ready")).status == 0


async def test_a_cut_behind_done_is_none(address):
    stream = Stream(Attempt("a", "s0", 0, 0.0, dones=1))
    stream.cut("fin", "nemesis")
    assert stream.attempt.cut_by is None
