"""Responses that nobody waits for: made without their client, read and ended on any replica, gone on with by another
process when theirs dies. Two processes are two apps over one state directory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from phi_cluster.cluster.errors import ContextOverflow, LimitReached, Overloaded
from phi_cluster.cluster.http.server import build_app
from phi_cluster.cluster.responses.assembly import ResponseRoom
from phi_cluster.cluster.turn_api import (
    BEGINNING,
    Position,
    TextDelta,
    TextPiece,
    TokenLogprob,
    TurnFinished,
    TurnStarted,
    piece_text,
)

RESPONSES = "/v1/responses"
ASK = {"model": "phi", "input": "Hi", "background": True}
PATIENCE = 10.0


class Replica:
    """An app, its room, its turns and a client of its own."""

    def __init__(self, room: ResponseRoom, turns: Any, app: FastAPI, client: httpx.AsyncClient):
        self.room, self.turns, self.app, self.client = room, turns, app, client

    async def create(self, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post(RESPONSES, json={**ASK, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def get(self, response_id: str) -> dict[str, Any]:
        answer = await self.client.get(f"{RESPONSES}/{response_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def over(self, response_id: str) -> dict[str, Any]:
        """The response when it is over."""

        async def is_over() -> bool:
            return (await self.get(response_id))["status"] not in ("queued", "in_progress")

        await until(is_over)
        return await self.get(response_id)

    async def events(self, response_id: str, starting_after: int | None = None) -> list[dict[str, Any]]:
        """All that come, until the stream ends."""
        params: dict[str, Any] = {"stream": "true"}
        if starting_after is not None:
            params["starting_after"] = starting_after
        answer = await asyncio.wait_for(self.client.get(f"{RESPONSES}/{response_id}", params=params), PATIENCE)
        assert answer.status_code == 200, answer.text
        return typed(answer.text)


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async def poll() -> None:
        while not await check():  # noqa: ASYNC110 -- another process may do it
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), PATIENCE)


def typed(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block]
    return [json.loads(block.partition("\ndata: ")[2]) for block in blocks]


@pytest.fixture
def alive() -> set[int]:
    """The pids of the processes that live."""
    return set()


@pytest.fixture
async def start(
    make_room, turns, tokens, sessions, engines, health, observer, watch, settings, alive
) -> AsyncIterator[Callable[..., Replica]]:
    """`start(pid)`: a replica in a process of its own, with turns of its own."""
    async with AsyncExitStack() as stack:

        def start(pid: int, **options: Any) -> Replica:
            alive.add(pid)
            own = type(turns)()
            room = make_room(pid, alive, own, **options)
            room.start()
            stack.push_async_callback(room.close)
            parts = own, tokens, room.responses, room.conversations, sessions, engines, health, observer, watch
            app = build_app(settings, *parts)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://edge.test")
            stack.push_async_callback(client.aclose)
            return Replica(room, own, app, client)

        yield start


def hold(replica: Replica, num_events: int) -> asyncio.Event:
    """The replica's turns stop after so many events, until this is set."""
    gate = asyncio.Event()
    replica.turns.script.insert(num_events, gate)
    return gate


async def saved(replica: Replica, response_id: str, text: str) -> None:
    """Waits until the store has this text of a response that is being made elsewhere."""
    reading = await replica.room.responses.read("default", response_id)
    read = ""
    async for one in reading.events():
        read += "".join(map(piece_text, one)) if isinstance(one, tuple) else ""
        if read == text:
            return


async def test_it_is_made_without_its_client(start):
    one = start(1)
    gate = hold(one, 2)
    body = await one.create(metadata={"k": "v"})
    assert (body["status"], body["background"], body["output"]) == ("queued", True, [])
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    assert one.turns.requests[0].resume_from is None
    gate.set()
    body = await one.over(body["id"])
    assert body["status"] == "completed"
    assert body["output"][0]["content"][0]["text"] == "Hello, wörld"
    assert one.turns.ends == ["completed"]


async def test_a_reader_who_leaves_ends_nothing(start, connect):
    one = start(1)
    gate = hold(one, 2)
    connection = connect(RESPONSES, {**ASK, "stream": True}, over=one.app)
    seen = await connection.until(b"Hello")
    connection.disconnect()
    await connection.finished()
    first = typed(seen.decode())
    assert [event["type"] for event in first[:2]] == ["response.created", "response.in_progress"]
    response = first[0]["response"]
    assert response["status"] == "queued"
    gate.set()
    await one.over(response["id"])
    events = await one.events(response["id"])
    assert events[: len(first)] == first
    assert await one.events(response["id"], first[-1]["sequence_number"]) == events[len(first) :]


async def test_it_is_read_on_any_replica_while_it_is_made(start):
    one, two = start(1), start(2)
    gate = hold(one, 2)
    body = await one.create()
    following = [asyncio.create_task(replica.events(body["id"])) for replica in (one, two)]
    late = asyncio.create_task(two.events(body["id"], 4))
    await saved(two, body["id"], "Hello")
    assert (await two.get(body["id"]))["status"] == "in_progress"
    assert not any(task.done() for task in following)
    gate.set()
    here, there = [await task for task in following]
    assert here == there
    assert await late == here[5:]
    assert two.turns.requests == []


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("num_events", [0, 2])
async def test_it_is_cancelled_on_any_replica(start, on, num_events):
    replicas = [start(1), start(2)]
    hold(replicas[0], num_events)
    body = await replicas[0].create()
    await asyncio.wait_for(replicas[0].turns.begun.wait(), PATIENCE)
    if num_events:
        await saved(replicas[1], body["id"], "Hello")
    answer = await replicas[on].client.post(f"{RESPONSES}/{body['id']}/cancel")
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    assert replicas[0].turns.ends == ["cancelled"]
    output = answer.json()["output"]
    assert [item["content"][0]["text"] for item in output] == (["Hello"] if num_events else [])
    # Once more says the same.
    assert (await replicas[1 - on].client.post(f"{RESPONSES}/{body['id']}/cancel")).json() == answer.json()
    last = (await replicas[on].events(body["id"]))[-1]
    assert (last["type"], last["response"]) == ("response.incomplete", answer.json())
    # What was said can be gone on from.
    replicas[0].turns.script = [TurnStarted(1, 0), TurnFinished("stop", 1, 0, 0)]
    await replicas[0].over((await replicas[0].create(previous_response_id=body["id"]))["id"])


async def test_another_goes_on_when_its_process_dies(start, alive):
    one, two = start(1), start(2)
    gate = hold(one, 2)
    body = await one.create(input="Tell")
    reading = asyncio.create_task(two.events(body["id"]))
    await saved(two, body["id"], "Hello")
    alive.discard(1)
    events = await asyncio.wait_for(reading, PATIENCE)
    [first], [second] = one.turns.requests, two.turns.requests
    # The same request, read on from its beginning: nothing is computed twice, and the same comes out.
    assert (second.request_id, second.session_id) == (first.request_id, first.session_id)
    assert (second.messages, second.sampling) == (first.messages, first.sampling | {"stop_token_ids": []})
    assert second.resume_from == BEGINNING
    assert events[-1]["response"]["status"] == "completed"
    assert [event["delta"] for event in events if "delta" in event] == ["Hello", ", wörld"]
    # The dead one, should it wake up, has no say any more.
    gate.set()
    await asyncio.wait_for(one.turns.ended.wait(), PATIENCE)
    assert await one.events(body["id"]) == await two.events(body["id"]) == events


async def test_another_goes_on_with_the_same_log_probabilities(start, alive):
    """What was told stays, also where the same number comes out with other last bits."""
    one, two = start(1), start(2)
    for replica, error in ((one, 0.0), (two, 1e-15)):
        texts = (("Hello", -0.5), (", you", -0.25))
        pieces = [TextPiece(text, (TokenLogprob(text.encode(), number + error, ()),)) for text, number in texts]
        replica.turns.script = [
            TurnStarted(7, 3),
            *(TextDelta(piece.text, 1, Position(i, i), (piece,)) for i, piece in enumerate(pieces, start=1)),
            TurnFinished("stop", 7, 3, 2),
        ]
    hold(one, 2)
    body = await one.create(include=["message.output_text.logprobs"])
    await saved(two, body["id"], "Hello")
    alive.discard(1)
    over = await two.over(body["id"])
    events = await two.events(body["id"])
    numbers = [-0.5, -0.25 + 1e-15]
    assert [one["logprob"] for one in over["output"][0]["content"][0]["logprobs"]] == numbers
    assert [[one["logprob"] for one in event["logprobs"]] for event in events if "delta" in event] == [
        [number] for number in numbers
    ]
    assert two.turns.requests[0].sampling["logprobs"] == 0


async def test_what_comes_out_otherwise_is_not_passed_off_as_the_same(start, alive):
    one, two = start(1), start(2)
    hold(one, 2)
    two.turns.script[1] = TextDelta("Bye", 1, Position(1, 1))
    body = await one.create()
    await saved(two, body["id"], "Hello")
    alive.discard(1)
    body = await two.over(body["id"])
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    assert "another one" in body["error"]["message"]
    assert body["output"][0]["content"][0]["text"] == "Hello"


async def test_what_comes_out_shorter_is_not_the_same_either(start, alive):
    one, two = start(1), start(2)
    hold(one, 2)
    two.turns.script = [TurnStarted(7, 3), TurnFinished("stop", 7, 3, 0)]
    body = await one.create()
    await saved(two, body["id"], "Hello")
    alive.discard(1)
    assert (await two.over(body["id"]))["status"] == "failed"


async def test_it_outlives_a_restart(start, alive):
    one = start(1)
    hold(one, 2)
    body, waiting = await one.create(), await one.create()
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    await one.room.close()
    alive.discard(1)
    two = start(2)
    for response in (body, waiting):
        assert (await two.over(response["id"]))["status"] == "completed"
    assert {turn.request_id for turn in two.turns.requests} == {turn.request_id for turn in one.turns.requests}


@pytest.mark.parametrize("pid", [1, 2])
async def test_after_a_boot_another_process_may_have_its_pid(start, pid):
    one = start(1)
    hold(one, 2)
    body = await one.create()
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    await one.room.close()
    later = start(pid, era="next boot")
    assert (await later.over(body["id"]))["status"] == "completed"


async def test_in_the_foreground_it_fails_with_its_process(start, alive):
    one = start(1)
    hold(one, 2)
    asking = asyncio.create_task(one.client.post(RESPONSES, json={**ASK, "background": False}))
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    response_id = f"resp_{one.turns.requests[0].request_id}"
    alive.discard(1)
    two = start(2)
    body = await two.over(response_id)
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    assert two.turns.requests == []
    asking.cancel()


@pytest.mark.parametrize("error", [Overloaded("no room", retry_after=0.01), LimitReached("no", retry_after=0.01)])
async def test_what_passes_is_tried_again(start, error):
    one = start(1)
    script = one.turns.script
    one.turns.script = [error]
    body = await one.create()

    async def is_tried() -> bool:
        return len(one.turns.requests) > 2

    await until(is_tried)
    assert (await one.get(body["id"]))["status"] == "queued"
    one.turns.script = script
    assert (await one.over(body["id"]))["status"] == "completed"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ContextOverflow("3 tokens too many", param="messages"), "invalid_prompt"),
        (LimitReached("too many sessions"), "rate_limit_exceeded"),
    ],
)
async def test_what_does_not_pass_is_not_tried_again(start, error, code):
    one = start(1)
    one.turns.script = [error]
    body = await one.over((await one.create())["id"])
    assert body["error"] == {"code": code, "message": error.message}
    events = await one.events(body["id"])
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]


async def test_no_more_run_than_may_and_no_more_wait(start):
    one = start(1, max_background=1, max_queued=1)
    gate = hold(one, 1)
    running, waiting = await one.create(), await one.create()
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    answer = await one.client.post(RESPONSES, json=ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert len(one.turns.requests) == 1
    # One that waits is cancelled without ever having run.
    assert (await one.client.post(f"{RESPONSES}/{waiting['id']}/cancel")).json()["status"] == "cancelled"
    gate.set()
    assert (await one.over(running["id"]))["status"] == "completed"
    assert (await one.over((await one.create())["id"]))["status"] == "completed"
    assert len(one.turns.requests) == 2


@pytest.mark.parametrize("on", [0, 1])
async def test_deleting_ends_it(start, on, tmp_path):
    replicas = [start(1), start(2)]
    hold(replicas[0], 2)
    body = await replicas[0].create(input="canary")
    await asyncio.wait_for(replicas[0].turns.begun.wait(), PATIENCE)
    reading = asyncio.create_task(replicas[1].events(body["id"]))
    answer = await replicas[on].client.delete(f"{RESPONSES}/{body['id']}")
    assert answer.json()["deleted"] is True
    assert replicas[0].turns.ends == ["cancelled"]
    assert (await replicas[1 - on].client.get(f"{RESPONSES}/{body['id']}")).status_code == 404
    await asyncio.wait_for(asyncio.gather(reading, return_exceptions=True), PATIENCE)
    assert b"canary" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


async def test_only_a_response_that_is_over_can_be_gone_on_from(start):
    one = start(1)
    gate = hold(one, 2)
    body = await one.create()
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    answer = await one.client.post(RESPONSES, json={**ASK, "previous_response_id": body["id"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conversation_locked")
    # Whoever asks a moment before it is over waits that moment.
    asking = asyncio.create_task(one.create(previous_response_id=body["id"]))
    gate.set()
    assert (await one.over((await asking)["id"]))["status"] == "completed"


async def test_a_session_in_use_is_forgotten_later(start, sessions):
    """Its turn was running when what it remembers was deleted."""
    one = start(1)
    body = await one.over((await one.create())["id"])
    busy = True

    class Busy(dict[Any, Any]):
        def __delitem__(self, key: Any) -> None:
            if busy:
                raise Overloaded("a turn is running")
            super().__delitem__(key)

    sessions.add("default", body["id"])
    sessions.known = Busy(sessions.known)
    assert (await one.client.delete(f"{RESPONSES}/{body['id']}")).status_code == 200
    assert len(sessions.known) == 1
    await one.room.close()
    busy = False
    two = start(2)

    async def is_forgotten() -> bool:
        return not sessions.known

    await until(is_forgotten)
    await two.room.close()


async def test_what_is_too_old_goes_by_itself_with_its_session(start, sessions, tmp_path):
    one = start(1)
    body = await one.over((await one.create(input="canary"))["id"])
    sessions.add("default", body["id"])
    await one.room.close()
    two = start(2, retention=-1.0)

    async def is_gone() -> bool:
        return (await two.client.get(f"{RESPONSES}/{body['id']}")).status_code == 404 and not sessions.known

    await until(is_gone)
    await two.room.close()
    assert b"canary" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


async def test_a_refused_response_leaves_no_session(start, sessions):
    """Its turn had begun one, under a name that nobody knows."""
    one = start(1)
    gate = asyncio.Event()
    one.turns.script = [gate, ContextOverflow("too many")]
    asking = asyncio.create_task(one.client.post(RESPONSES, json={**ASK, "background": False}))
    await asyncio.wait_for(one.turns.begun.wait(), PATIENCE)
    sessions.add("default", one.turns.requests[0].session_id)
    gate.set()
    assert (await asking).status_code == 400

    async def is_gone() -> bool:
        return not sessions.known

    await until(is_gone)
