"""Keep-alive comments, and what a client's leaving does. Driven as an ASGI server drives the app."""

import asyncio
from dataclasses import replace

import httpx
import openai
import pytest

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.turn_api import Position, TextDelta, TurnStarted

HELLO = [{"role": "user", "content": "Hi"}]
STREAM = {"messages": HELLO, "stream": True}
WHOLE = {"messages": HELLO}
PATH = "/v1/chat/completions"
COMMENT = b": keep-alive\n"


@pytest.fixture
def impatient(make_app, settings):
    """An app that sends a comment after 5 ms of silence."""
    return make_app(replace(settings, keep_alive_seconds=0.005))


async def test_comments_before_the_first_event_and_between_events(connect, impatient, turns, events):
    admitted, stepped = asyncio.Event(), asyncio.Event()
    turns.script.insert(2, stepped)
    turns.script.insert(0, admitted)
    connection = connect(PATH, STREAM, over=impatient)
    start = await connection.next()
    assert start["status"] == 200
    body = await connection.until(COMMENT * 2)
    assert body == COMMENT * 2
    admitted.set()
    body += await connection.until(b"Hello")
    body += await connection.until(COMMENT * 3)
    stepped.set()
    body += await connection.until(b"[DONE]")
    await connection.finished()
    texts = [event["choices"][0]["delta"].get("content") for event in events(body)]
    assert texts == ["", "Hello", ", wörld", None]
    assert turns.ends == ["completed"]


async def test_no_comments_where_only_data_is_wanted(connect, impatient, turns):
    stepped = asyncio.Event()
    turns.script.insert(2, stepped)
    connection = connect(PATH, {**STREAM, "stream_options": {"data_only": True}}, over=impatient)
    body = await connection.until(b"Hello")
    # As long as five comments would take.
    await asyncio.sleep(0.025)
    stepped.set()
    body += await connection.until(b"[DONE]")
    await connection.finished()
    assert COMMENT not in body
    assert b"id: " not in body


async def test_comments_between_events_with_ids_are_nothing_to_the_official_client(connect, impatient, turns):
    stepped = asyncio.Event()
    turns.script.insert(2, stepped)
    connection = connect(PATH, STREAM, over=impatient)
    body = await connection.until(b"Hello")
    assert b"id: " in body
    body += await connection.until(COMMENT * 2)
    stepped.set()
    body += await connection.until(b"[DONE]")
    await connection.finished()

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body)

    with openai.OpenAI(
        base_url="http://fake/v1", api_key="unused", http_client=httpx.Client(transport=httpx.MockTransport(answer))
    ) as client:
        chunks = list(client.chat.completions.create(model="any", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, wörld"


async def test_a_silent_request_has_no_status_yet(connect, turns):
    turns.script.insert(0, asyncio.Event())
    connection = connect(PATH, STREAM)
    await turns.begun.wait()
    assert connection.is_silent


async def test_an_error_after_comments_is_an_event(connect, impatient, turns, events):
    refused = asyncio.Event()
    turns.script = [refused, Overloaded("no room")]
    connection = connect(PATH, STREAM, over=impatient)
    body = await connection.until(COMMENT)
    refused.set()
    body += await connection.until(b"[DONE]")
    await connection.finished()
    assert events(body)[-1]["error"]["code"] == "overloaded"


async def test_text_held_back_is_silence(connect, impatient, turns):
    """Events without text send nothing, so they must not put the comment off."""
    turns.script[1:] = [step for _ in range(3) for step in (TextDelta("", 1, Position(1, 1)), asyncio.Event())]
    connection = connect(PATH, STREAM, over=impatient)
    await connection.until(b"assistant")
    assert await connection.until(COMMENT) == COMMENT


async def test_the_stream_is_silent_after_its_end(connect, impatient):
    connection = connect(PATH, STREAM, over=impatient)
    await connection.until(b"[DONE]")
    await connection.finished()
    assert connection.is_silent


@pytest.mark.parametrize("body", [STREAM, WHOLE])
@pytest.mark.parametrize("started", [False, True])
async def test_a_client_that_leaves_ends_its_turn(connect, turns, observer, body, started):
    turns.script.insert(2 if started else 0, asyncio.Event())
    connection = connect(PATH, body)
    await turns.begun.wait()
    if started and body is STREAM:
        await connection.until(b"Hello")
    connection.disconnect()
    await connection.finished()
    assert turns.ends == ["cancelled"]
    [*_, finish] = observer.calls
    assert finish[:3] == ("finish", "chat", "abort")
    assert connection.is_silent


async def test_a_client_that_stops_reading_and_leaves_ends_its_turn(connect, turns):
    connection = connect(PATH, STREAM)
    connection.reading.clear()
    await turns.begun.wait()
    assert turns.ends == []
    connection.disconnect()
    await connection.finished()
    # It was suspended at a yield, waiting for the text to be sent.
    assert turns.ends == ["closed"]


async def test_a_server_that_cannot_send_ends_the_turn(connect, turns, observer, caplog):
    gate = asyncio.Event()
    turns.script.insert(2, gate)
    connection = connect(PATH, STREAM)
    await connection.until(b"Hello")
    connection.broken = BrokenPipeError()
    gate.set()
    await connection.finished()
    assert turns.ends == ["closed"]
    assert observer.calls[-1][:3] == ("finish", "chat", "abort")
    assert caplog.text == ""


async def test_a_server_that_cannot_send_a_whole_reply(connect, turns, caplog):
    gate = asyncio.Event()
    turns.script.insert(2, gate)
    connection = connect(PATH, WHOLE)
    await turns.begun.wait()
    connection.broken = BrokenPipeError()
    gate.set()
    await connection.finished()
    assert turns.ends == ["completed"]
    assert caplog.text == ""


async def test_a_server_that_stops_ends_the_turn(connect, turns, observer):
    turns.script.insert(2, asyncio.Event())
    connection = connect(PATH, STREAM)
    await connection.until(b"Hello")
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert turns.ends == ["cancelled"]
    assert observer.calls[-1][:3] == ("finish", "chat", "abort")


async def test_a_second_cancellation_does_not_disturb_the_runners_leaving(connect, turns):
    """The server under us may cancel a request whose client's leaving we have seen already."""
    turns.script.insert(1, asyncio.Event())
    turns.may_end.clear()
    connection = connect(PATH, STREAM)
    await turns.begun.wait()
    connection.disconnect()
    await turns.leaving.wait()
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert turns.ends == []
    turns.may_end.set()
    await turns.ended.wait()
    assert turns.ends == ["cancelled"]


async def test_nothing_is_left_running(connect, turns):
    before = asyncio.all_tasks()
    for body in (STREAM, WHOLE):
        turns.script.insert(1, asyncio.Event())
        connection = connect(PATH, body)
        await turns.begun.wait()
        connection.disconnect()
        await connection.finished()
        turns.begun.clear()
    assert asyncio.all_tasks() == before


async def test_one_clients_leaving_does_not_touch_another(connect, turns):
    gate = asyncio.Event()
    turns.script.insert(2, gate)
    leaver, stayer = connect(PATH, STREAM), connect(PATH, STREAM)
    await leaver.until(b"Hello")
    await stayer.until(b"Hello")
    leaver.disconnect()
    await leaver.finished()
    gate.set()
    await stayer.until(b"[DONE]")
    await stayer.finished()
    assert turns.ends == ["cancelled", "completed"]


async def test_a_client_that_leaves_before_its_body_is_complete(connect, turns, caplog):
    connection = connect(PATH)
    connection.feed(b'{"messages": [', more=True)
    connection.disconnect()
    await connection.finished()
    assert turns.requests == []
    assert connection.is_silent
    assert caplog.text == ""


async def test_a_body_that_is_too_large_is_not_read_to_its_end(connect, turns):
    connection = connect(PATH)
    for _ in range(100):
        connection.feed(b" " * 10_000, more=True)
    start = await connection.next()
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]
    await connection.finished()
    # 64 KiB are allowed: the seventh piece was one too many.
    assert connection.num_unread == 93
    assert turns.requests == []


async def test_a_body_announced_as_too_large_is_not_read_at_all(connect):
    connection = connect(PATH, headers={"content-length": str(100 * 2**20)})
    connection.feed(b" " * 10, more=True)
    assert (await connection.next())["status"] == 413
    await connection.finished()
    assert connection.num_unread == 1


async def test_observer_counts_a_turn(connect, turns, observer):
    connection = connect(PATH, STREAM)
    await connection.until(b"[DONE]")
    await connection.finished()
    # The fake clock takes a second at each look: begin, three events with tokens, end.
    assert observer.calls == [
        ("start", "chat"),
        ("first", "chat", 1.0),
        ("token", "chat", 1, 1.0),
        ("token", "chat", 2, 1.0),
        ("finish", "chat", "stop", 4.0, 7, 3, 5),
    ]


async def test_observer_counts_a_failed_turn_as_far_as_it_went(connect, turns, observer):
    turns.script = [TurnStarted(7, 3), TextDelta("a", 2, Position(2, 2)), Overloaded("gone")]
    connection = connect(PATH, WHOLE)
    await connection.finished()
    assert observer.calls[-1] == ("finish", "chat", "error", 2.0, 7, 3, 2)


@pytest.mark.parametrize("body", [STREAM, WHOLE])
async def test_a_client_that_does_not_read_is_taken_for_gone(connect, make_app, settings, turns, observer, body):
    """Neither its turn nor what the turn brought is kept for it for ever."""
    hasty = make_app(replace(settings, write_seconds=0.02))
    connection = connect(PATH, body, over=hasty)
    connection.reading.clear()
    await connection.finished()
    assert turns.ends == ["closed" if body is STREAM else "completed"]
    assert observer.calls[-1][:3] == ("finish", "chat", "abort" if body is STREAM else "stop")


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_nor_is_a_response_kept_for_it(connect, make_app, settings, turns, is_streamed):
    body = {"input": "Hi", "stream": is_streamed}
    connection = connect("/v1/responses", body, over=make_app(replace(settings, write_seconds=0.02)))
    connection.reading.clear()
    await connection.finished()


async def test_a_client_that_reads_slowly_is_not(connect, make_app, settings, turns):
    """The limit is for each write, not for the reply; silence of ours is none of its."""
    patient = make_app(replace(settings, write_seconds=0.03, keep_alive_seconds=0.01))
    stepped = asyncio.Event()
    turns.script.insert(2, stepped)
    connection = connect(PATH, STREAM, over=patient)
    await connection.until(COMMENT * 6)
    stepped.set()
    await connection.until(b"[DONE]")
    await connection.finished()
    assert turns.ends == ["completed"]


@pytest.mark.parametrize("sent", [None, b'{"messages": '])
async def test_a_body_that_does_not_come_is_not_waited_for(connect, make_app, settings, turns, sent):
    connection = connect(PATH, over=make_app(replace(settings, body_seconds=0.01)))
    if sent is not None:
        connection.feed(sent, more=True)
    start = await connection.next()
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    body = await connection.next()
    assert b'"request_timeout"' in body["body"]
    await connection.finished()
    assert turns.requests == []
