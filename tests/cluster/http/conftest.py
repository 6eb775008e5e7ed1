"""Fakes for what the edge is built from, an app over them, and three ways to talk to it."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from phi_cluster.cluster.errors import InvalidRequest, NotFound, SessionExists, Unauthorized
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.server import build_app
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.responses.assembly import ResponseRoom
from phi_cluster.cluster.responses.making import MakerLimits
from phi_cluster.cluster.responses.run import Tools
from phi_cluster.cluster.responses.store import Branch
from phi_cluster.cluster.responses.workshop import Rhythm
from phi_cluster.cluster.session_api import Download, ImportLimits, SessionPage, SessionQuery
from phi_cluster.cluster.turn_api import (
    Identity,
    Position,
    TextDelta,
    TurnEvent,
    TurnFinished,
    TurnRequest,
    TurnStarted,
)
from phi_cluster.cluster.watch_api import EventPage

BASE_URL = "http://edge.test"
# Far longer than anything here takes: only a hang ends in it.
PATIENCE = 10.0


class FakeTurns:
    """Plays a script: events are yielded, exceptions raised, `asyncio.Event`s waited for."""

    def __init__(self) -> None:
        self.script: list[TurnEvent | Exception | asyncio.Event] = [
            TurnStarted(num_prompt_tokens=7, num_cached_tokens=3),
            TextDelta("Hello", 1, Position(1, 0xABC)),
            TextDelta("", 1, Position(2, 2)),
            TextDelta(", wörld", 2, Position(4, 0xFFFFFFFF)),
            TurnFinished("stop", num_prompt_tokens=7, num_cached_tokens=3, num_completion_tokens=5),
        ]
        self.requests: list[TurnRequest] = []
        # completed | cancelled | closed | raised, one for each run that is over.
        self.ends: list[str] = []
        self.begun, self.leaving, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        # Putting a turn away waits for this.
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        self.requests.append(request)
        self.begun.set()
        end = "completed"
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    end = "raised"
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        except asyncio.CancelledError:
            end = "cancelled"
            raise
        except GeneratorExit:
            end = "closed"
            raise
        finally:
            self.leaving.set()
            await self.may_end.wait()
            self.ends.append(end)
            self.ended.set()


class FakeTokens:
    """A character is a token; chats are their contents; < and > are what stands around a text."""

    async def of_prompt(self, request: TurnRequest, *, add_special_tokens: bool) -> list[int]:
        text = request.prompt
        if request.messages is not None:
            text = "|".join(message["content"] for message in request.messages) + "+" * request.add_generation_prompt
        assert isinstance(text, str)
        if text == "refused":
            raise InvalidRequest("the template refuses this", param="messages")
        return list(map(ord, f"<{text}>" if add_special_tokens else text))

    async def names(self, token_ids: Sequence[int]) -> list[str]:
        return [f"U+{token_id:x}" for token_id in token_ids]

    async def text(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


class FakeSessions:
    """Sessions in a dictionary, by tenant and id."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        # Asked for by responses: (tenant, what the new session begins like, its name).
        self.branches: list[tuple[str, Branch, str]] = []
        self.queries: list[SessionQuery] = []
        self.said: dict[str, list[dict[str, str]]] = {}
        self.downloads: list[Download] = []
        # Behind what is exported.
        self.cache = b""

    def add(self, tenant: str, session_id: str) -> None:
        self.known[tenant, session_id] = {
            "id": session_id,
            "state": "active",
            "num_tokens": 59,
            "kv_cache_bytes": 8192,
            "process_bytes": 1 << 20,
            "turns": 2,
            "age_seconds": 3.5,
            "idle_seconds": 1.5,
            "activation": 1,
            "recycles": 0,
            "holder": "actor",
            "node_id": "n",
            "actor_pid": 4121,
            "engine_pid": None,
        }

    async def browse(self, query: SessionQuery) -> SessionPage:
        self.queries.append(query)
        known = [(key, one) for key, one in self.known.items() if query.tenant in (None, key[0])]
        known = [(key, one) for key, one in known if query.state in (None, one["state"])]
        known = [(key, one) for key, one in known if (query.search or "") in key[1]]
        field = {"tokens": "num_tokens", "age": "age_seconds", "idle": "idle_seconds"}.get(query.sort, query.sort)
        known.sort(key=lambda one: one[1][field], reverse=query.is_descending)
        cursors = [key[1] if query.tenant else "/".join(key) for key, _ in known]
        if query.after is not None and query.after not in cursors:
            raise InvalidRequest("after: that session is not in this list any more", param="after")
        begin = 0 if query.after is None else cursors.index(query.after) + 1
        page = slice(begin, begin + query.limit)
        found = [one | {"tenant": key[0]} for key, one in known[page]]
        totals = {"sessions": len(known), "by_state": dict(Counter(one["state"] for _, one in known))}
        totals |= {name: sum(one.get(name, 0) for _, one in known) for name in ("kv_cache_bytes", "disk_bytes")}
        return SessionPage(found, totals, page.stop < len(known), cursors[page][-1] if found else None)

    async def get(self, tenant: str, session_id: str) -> dict[str, Any]:
        if (tenant, session_id) not in self.known:
            raise NotFound(f"There is no session {session_id}", param="session_id")
        return self.known[tenant, session_id]

    async def delete(self, tenant: str, session_id: str) -> None:
        await self.get(tenant, session_id)
        del self.known[tenant, session_id]

    async def clear(self, tenant: str, session_id: str) -> dict[str, Any]:
        session = await self.get(tenant, session_id)
        session.update(num_tokens=0, kv_cache_bytes=0)
        return session

    async def hibernate(self, tenant: str, session_id: str) -> dict[str, Any]:
        session = await self.get(tenant, session_id)
        session.update(state="hibernated", kv_cache_bytes=0, disk_bytes=8192)
        return session

    async def messages(self, tenant: str, session_id: str) -> list[dict[str, str]]:
        await self.get(tenant, session_id)
        return self.said.get(session_id, [])

    async def export(self, tenant: str, session_id: str, cache_up_to: int | None = None) -> Download:
        self.exported_up_to = cache_up_to
        data = b"exported " + (await self.get(tenant, session_id))["id"].encode() + self.cache
        self.downloads.append(Download(io.BytesIO(data), len(data)))
        return self.downloads[-1]

    async def import_session(
        self, tenant: str, new_session_id: str | None, data: AsyncIterator[bytes], limits: ImportLimits
    ) -> dict[str, Any]:
        self.import_limits = limits
        whole = b"".join([piece async for piece in data])
        if not whole.startswith(b"exported "):
            raise InvalidRequest("this is not an exported session", code="bad_export")
        return await self.fork(tenant, whole.decode().removeprefix("exported "), new_session_id, None)

    async def fork(self, tenant: str, session_id: str, new_session_id: str | None, turn: int | None) -> dict[str, Any]:
        session = await self.get(tenant, session_id)
        new = new_session_id or "made"
        if (tenant, new) in self.known:
            raise SessionExists(f"there is a session {new}", param="id")
        if turn is not None and turn > session["turns"]:
            raise InvalidRequest("there are fewer turns", param="turn")
        self.known[tenant, new] = session | {"id": new, "turns": turn or session["turns"]}
        return self.known[tenant, new]

    async def recycle(self, tenant: str, session_id: str) -> dict[str, Any]:
        session = await self.get(tenant, session_id)
        session["recycles"] += 1
        return session

    async def branch(self, tenant: str, origin: Branch, session_id: str) -> None:
        self.branches.append((tenant, origin, session_id))


class FakeEngines:
    def __init__(self) -> None:
        self.answer: int | Exception = 2

    async def recycle_engines(self) -> int:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class FakeWatch:
    """`told`: events by number, of which some may be about a session of a tenant. `more` lets those who wait go on."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.is_ending = False
        self.more = asyncio.Event()
        # One more each time that somebody waits.
        self.waited = asyncio.Semaphore(0)
        self.asked: list[tuple[int | None, int, str | None, float]] = []

    def add(self, tenant: str | None = None, session_id: str | None = None) -> None:
        number = 101 + len(self.told)
        event = {"object": "event", "number": number, "id": f"e{number}", "time": 1.5, "kind": "engine_died"}
        more = {"text": "an engine was lost", "count": 1, "reason": "death", "seconds": None, "node_id": "n"}
        self.told.append(event | more | {"tenant": tenant, "session_id": session_id})
        self.more.set()

    async def cluster(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"nodes": [], "replicas": [], "controller": {}, "last_minute": {}, "history": []}
        return (
            {"object": "cluster", "time": 1.5, "weights_bytes": 1, "requests_running": 0}
            | parts
            | {"requests_waiting": 0}
        )

    async def events(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float) -> EventPage:
        self.asked.append((after, limit, tenant, wait_seconds))
        if wait_seconds:
            self.waited.release()
        if wait_seconds and not self.is_ending and not [one for one in self.told if one["number"] > (after or 0)]:
            self.more.clear()
            await self.more.wait()
        found = [one for one in self.told if after is None or one["number"] > after]
        page = found[-limit:] if after is None else found[:limit]
        last = page[-1]["number"] if page else max(after or 0, 100 + len(self.told))
        return EventPage(page, last, len(found) > len(page), self.is_ending)


class FakeKeys:
    """Two tenants with one key each; alice is an admin."""

    def identify(self, key: str) -> Identity:
        known = {"phi-alice": Identity("alice", frozenset({"admin"})), "phi-bob": Identity("bob")}
        if key not in known:
            raise Unauthorized("This API key is not valid here")
        return known[key]


class FakeUsage:
    def __init__(self) -> None:
        self.asked: list[str | None] = []

    async def usage(self, tenant: str | None) -> Sequence[dict[str, Any]]:
        self.asked.append(tenant)
        numbers = ("requests", "refused", "prompt_tokens", "cached_tokens", "completion_tokens")
        numbers += ("turns_running", "sessions", "kv_cache_bytes")
        limits = ("requests_per_minute", "tokens_per_minute", "concurrent_turns", "sessions", "kv_bytes")
        one = {"name": tenant or "alice", "since": 1.5, "limits": dict.fromkeys(limits)}
        return [one | dict.fromkeys(numbers, 1)]


class FakeHealth:
    def __init__(self) -> None:
        self.is_live = True
        self.not_ready_because: str | None = None

    def live(self) -> bool:
        return self.is_live

    def ready(self) -> tuple[bool, str]:
        return self.not_ready_because is None, self.not_ready_because or ""


class RecordingObserver:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors: list[tuple[Any, ...]] = []

    def on_start(self, *call: Any) -> None:
        self.calls.append(("start", *call))

    def on_first_token(self, *call: Any) -> None:
        self.calls.append(("first", *call))

    def on_token(self, *call: Any) -> None:
        self.calls.append(("token", *call))

    def on_finish(self, *call: Any) -> None:
        self.calls.append(("finish", *call))

    def on_error(self, *call: Any) -> None:
        self.errors.append(call)


class FakeClock:
    """Each look at the monotonic clock takes a second."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return 1_750_000_000.25

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


class Connection:
    """One request as the server under an ASGI app sees it, message by message."""

    def __init__(self, app: FastAPI, path: str, body: bytes | None, headers: dict[str, str]) -> None:
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        # While clear, `send` does not return: a client that does not read.
        self.reading = asyncio.Event()
        self.reading.set()
        # Raised by `send`, as some servers do once the client is gone.
        self.broken: OSError | None = None
        if body is not None:
            self.feed(body, more=False)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 4),
            "server": ("edge.test", 80),
            "state": {},
        }
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        if self.broken is not None:
            raise self.broken
        await self.reading.wait()
        self._outbox.put_nowait(message)

    def feed(self, chunk: bytes, more: bool) -> None:
        self._inbox.put_nowait({"type": "http.request", "body": chunk, "more_body": more})

    def disconnect(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def num_unread(self) -> int:
        """Messages that the app has not asked for."""
        return self._inbox.qsize()

    @property
    def is_silent(self) -> bool:
        return self._outbox.empty()

    async def next(self) -> dict[str, Any]:
        """The app's next message."""
        return await asyncio.wait_for(self._outbox.get(), PATIENCE)

    async def until(self, needle: bytes) -> bytes:
        """The response's body so far, up to and with the message that holds `needle`."""
        body = b""
        while needle not in body:
            body += (await self.next()).get("body", b"")
        return body

    async def finished(self) -> None:
        await asyncio.wait_for(asyncio.shield(self.task), PATIENCE)


@pytest.fixture
def turns() -> FakeTurns:
    return FakeTurns()


@pytest.fixture
def refused_chat(client: httpx.AsyncClient, turns: FakeTurns) -> Callable[..., Awaitable[None]]:
    """`await refused_chat(body, param, word)`: a 400 that names the field, briefly, and no turn."""

    async def check(body: dict[str, Any], param: str, word: str) -> None:
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert word in error["message"]
        assert len(error["message"]) < 500
        assert not turns.requests

    return check


@pytest.fixture
def tokens() -> FakeTokens:
    return FakeTokens()


@pytest.fixture
def sessions() -> FakeSessions:
    return FakeSessions()


@pytest.fixture
def watch() -> FakeWatch:
    return FakeWatch()


@pytest.fixture
def health() -> FakeHealth:
    return FakeHealth()


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines()


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@pytest.fixture
def usage() -> FakeUsage:
    return FakeUsage()


@pytest.fixture
def observer() -> RecordingObserver:
    return RecordingObserver()


@pytest.fixture
def settings() -> EdgeSettings:
    return EdgeSettings(
        served_model_names=("phi", "org/phi-alias"),
        max_model_len=128,
        vocab_size=1000,
        max_body_bytes=64 * 1024,
        max_import_bytes=2**20,
        keep_alive_seconds=PATIENCE,
        system_fingerprint="fp_test",
    )


@pytest.fixture
def make_room(
    tmp_path: Path, turns: FakeTurns, sessions: FakeSessions, observer: RecordingObserver
) -> Callable[..., ResponseRoom]:
    """`make_room(pid)`: the responses as one process sees them; `alive`: the pids of those that live."""

    def make_room(
        pid: int = 1, alive: Container[int] = (1,), turns: FakeTurns = turns, era: str = "boot", **limits: float
    ) -> ResponseRoom:
        return ResponseRoom(
            tmp_path / "state",
            Tools(turns, observer, FakeClock()),
            sessions,
            MakerLimits(**{"retention": 1000.0, "wait": 0.3, "max_background": 4, "max_queued": 4, **limits}),
            ProcessId(pid, pid),
            lambda process: process.pid in alive,
            era,
            Rhythm(save=0.01, tend=0.01, expire=0.05, look=0.01),
        )

    return make_room


@pytest.fixture
async def room(make_room: Callable[..., ResponseRoom]) -> AsyncIterator[ResponseRoom]:
    """Not started: nothing is saved but beginnings and ends."""
    room = make_room()
    yield room
    await room.close()


@pytest.fixture
def make_app(
    turns: FakeTurns,
    tokens: FakeTokens,
    sessions: FakeSessions,
    engines: FakeEngines,
    health: FakeHealth,
    observer: RecordingObserver,
    watch: FakeWatch,
    room: ResponseRoom,
) -> Callable[..., FastAPI]:
    def make_app(settings: EdgeSettings, **keys_and_usage: Any) -> FastAPI:
        parts = (
            turns,
            tokens,
            room.responses,
            room.conversations,
            sessions,
            engines,
            health,
            observer,
            watch,
            FakeClock(),
        )
        return build_app(settings, *parts, **keys_and_usage)

    return make_app


@pytest.fixture
def app(make_app: Callable[..., FastAPI], settings: EdgeSettings) -> FastAPI:
    return make_app(settings)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=BASE_URL) as client:
        yield client


@pytest.fixture
async def official(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    """The unmodified client that users have."""
    inner = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=BASE_URL)
    async with openai.AsyncOpenAI(
        base_url=BASE_URL + "/v1", api_key="sk-test", http_client=inner, max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def connect(app: FastAPI) -> AsyncIterator[Callable[..., Connection]]:
    """`connect(path, json)` or `connect(path, body=None)` to feed the body by hand."""
    connections: list[Connection] = []

    def connect(
        path: str, given: Any = None, *, over: FastAPI = app, headers: dict[str, str] | None = None
    ) -> Connection:
        body = None if given is None else json.dumps(given).encode()
        connections.append(Connection(over, path, body, headers or {}))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.task.cancel()
    await asyncio.gather(*(one.task for one in connections), return_exceptions=True)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[FastAPI], Awaitable[str]]]:
    """`await serve(app)`: its URL, behind a real server in this event loop."""
    async with AsyncExitStack() as stack:

        async def serve(app: FastAPI) -> str:
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))

            async def stop() -> None:
                server.should_exit = True
                await serving

            stack.push_async_callback(stop)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield serve


def _events(body: str | bytes) -> list[Any]:
    """The JSON of each SSE event; the last one must be [DONE] and is left out. Comments are not events."""
    text = body.decode() if isinstance(body, bytes) else body
    text = re.sub(r"^:.*\n", "", text, flags=re.MULTILINE)
    blocks = [block for block in text.split("\n\n") if block]
    # What carries text has an id line before it.
    blocks = [re.sub(r"\Aid: \S+\n", "", block) for block in blocks]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


@pytest.fixture
def events() -> Callable[[str | bytes], list[Any]]:
    return _events
