"""Clients of a real server: conversations that send their whole history, metrics, and the sessions' memory.

Owns: how tests ask, over HTTP and through /proc. Knows nothing of how a server is started (tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import BrowserContext, ConsoleMessage, Page, async_playwright
from prometheus_client.parser import text_string_to_metric_families

from phi_cluster.cluster.config import Config
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.tokenizer import Tokenizer
from tests.cluster.browser import Chromium

PAGE = 4096
# epoch, flags, seed, num_computed_tokens, num_tokens behind the segment header's identity.
_FIELDS = struct.Struct("=5q")
_FIELDS_OFFSET = 64


class Reply:
    """One turn's outcome. `details` is what x-phi-details brings; `comments` counts SSE comments."""

    def __init__(self, text: str, finish_reason: str, usage: dict[str, Any], details: dict[str, Any]):
        self.text = text
        self.finish_reason = finish_reason
        self.prompt = usage["prompt_tokens"]
        self.completion = usage["completion_tokens"]
        self.cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.details = details
        self.comments = 0

    def __repr__(self) -> str:
        return f"{self.text!r} [{self.prompt} prompt, {self.cached} cached, {self.completion} completion]"


class Refused(Exception):
    """An error response, or an error event in a stream (status None)."""

    def __init__(self, status: int | None, body: dict[str, Any], headers: httpx.Headers):
        super().__init__(f"{status}: {body}")
        self.status = status
        self.error = body.get("error", {})
        self.headers = headers


class Conversation:
    """A client that keeps the history and sends all of it each turn, greedy unless told otherwise."""

    def __init__(self, http: httpx.Client, session_id: str | None, key: str | None = None):
        self._http = http
        self.session_id = session_id
        self._headers = {"x-phi-details": "1"}
        if session_id is not None:
            self._headers["x-session-id"] = session_id
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self.messages: list[dict[str, str]] = []
        self.replies: list[Reply] = []

    @property
    def last(self) -> Reply:
        return self.replies[-1]

    def say(self, text: str, **fields: Any) -> Reply:
        """One turn, not streamed. Raises Refused (the history stays as it was)."""
        response = self._http.post("/v1/chat/completions", json=self._body(text, fields), headers=self._headers)
        if response.status_code != 200:
            raise refusal(response)
        return self._take(text, _whole(response.json()))

    def stream(self, text: str, **fields: Any) -> Stream:
        """One turn, streamed; the history grows if it is read to its end. Use `with`."""
        return Stream(self, text, self._body(text, {**fields, "stream": True}))

    def read_on(self, torn: Stream) -> Stream:
        """The rest of a reply whose stream broke. Use `with`."""
        headers = {"x-request-id": torn.response.headers["x-request-id"], "x-resume-from": str(torn.position)}
        return Stream(self, torn._text, torn._body, headers)

    def edit(self, num_messages: int) -> None:
        """Forgets all but the first messages, as a client does whose user edits the history."""
        del self.messages[num_messages:]

    def _body(self, text: str, fields: dict[str, Any]) -> dict[str, Any]:
        body = {"messages": [*self.messages, {"role": "user", "content": text}], "temperature": 0, **fields}
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        return body

    def _take(self, text: str, reply: Reply) -> Reply:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        self.replies.append(reply)
        return reply


class Stream:
    """A streamed turn that is being read. `times` are the moments at which its `pieces` came (monotonic seconds)."""

    def __init__(self, conversation: Conversation, text: str, body: dict[str, Any], headers: Any = None):
        self._conversation = conversation
        self._text = text
        self._body = body
        headers = conversation._headers | (headers or {})
        self._open = conversation._http.stream("POST", "/v1/chat/completions", json=body, headers=headers)
        # The last event's id.
        self.position = "0"
        self.pieces: list[str] = []
        self.times: list[float] = []
        self.comments = 0

    def __enter__(self) -> Stream:
        self.response = self._open.__enter__()
        if self.response.status_code != 200:
            self.response.read()
            try:
                raise refusal(self.response)
            finally:
                self._open.__exit__(None, None, None)
        self._lines = self.response.iter_lines()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(None, None, None)

    def read(self, num_pieces: int) -> Stream:
        """Reads until there are so many pieces of text in all."""
        while len(self.pieces) < num_pieces:
            assert self._next() is not None, f"the stream ended after {len(self.pieces)} pieces"
        return self

    def finish(self) -> Reply:
        """Reads the rest."""
        usage: dict[str, Any] = {}
        details: dict[str, Any] = {}
        finish_reason = ""
        while (event := self._next()) is not None:
            usage = event.get("usage") or usage
            details = event.get("phi") or details
            for choice in event["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
        assert usage, "the stream ended without usage"
        reply = Reply("".join(self.pieces), finish_reason, usage, details)
        reply.comments = self.comments
        return self._conversation._take(self._text, reply)

    def _next(self) -> dict[str, Any] | None:
        for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            if line.startswith("id: "):
                position = line.removeprefix("id: ")
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return None
            event = json.loads(data)
            if "error" in event:
                raise Refused(None, event, self.response.headers)
            pieces = [c["delta"]["content"] for c in event["choices"] if c["delta"].get("content")]
            if pieces:
                assert int(position.split("-")[0]) > int(self.position.split("-")[0])
                self.position = position
            self.pieces += pieces
            self.times += [time.monotonic()] * (len(self.pieces) - len(self.times))
            return event
        raise AssertionError("the stream ended without [DONE]")


def refusal(response: httpx.Response) -> Refused:
    try:
        return Refused(response.status_code, response.json(), response.headers)
    except ValueError:
        return Refused(response.status_code, {"error": {"message": response.text[:300]}}, response.headers)


def _whole(body: dict[str, Any]) -> Reply:
    choice = body["choices"][0]
    return Reply(choice["message"]["content"], choice["finish_reason"], body["usage"], body["phi"])


class Client:
    """Everything that can be asked of `server`, as one user (the default tenant) unless a key is given."""

    def __init__(self, server: Any, until: Callable[..., Any]):
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=120.0)
        self._until = until

    def close(self) -> None:
        self.http.close()

    def conversation(self, session_id: str | None, key: str | None = None) -> Conversation:
        return Conversation(self.http, session_id, key)

    def resumed(self, other: Conversation) -> Conversation:
        """The same conversation as it was held with another server."""
        conversation = self.conversation(other.session_id)
        conversation.messages, conversation.replies = list(other.messages), list(other.replies)
        return conversation

    def session(self, session_id: str) -> dict[str, Any]:
        """Raises Refused."""
        response = self.http.get(f"/v1/sessions/{session_id}")
        if response.status_code != 200:
            raise refusal(response)
        return response.json()

    def sessions(self) -> dict[str, dict[str, Any]]:
        """All of this user's, by id."""
        page = self.http.get("/v1/sessions?limit=1000")
        assert page.status_code == 200, page.text
        return {one["id"]: one for one in page.json()["data"]}

    def with_actor(self, session_id: str) -> dict[str, Any]:
        """The session's description once an actor of its own has it."""

        def look() -> dict[str, Any] | None:
            described = self.session(session_id)
            return described if described["holder"] == "actor" else None

        return self._until(look, f"an actor for {session_id}", 30)

    def patient(self, conversation: Conversation, text: str, seconds: float = 60.0, **fields: Any) -> Reply:
        """`say`, again and again while the way to the engine is being repaired: 5xx, no connection, or an answer that
        is not the server's (a new HAProxy says 404 in plain text before it knows a way)."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return conversation.say(text, **fields)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            except Refused as error:
                repairing = error.status is not None and (error.status >= 500 or "type" not in error.error)
                if time.monotonic() > deadline or not repairing:
                    raise
            time.sleep(0.1)

    def metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Samples by name."""
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(self.metrics_text()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
        return found

    def metrics_text(self) -> str:
        response = httpx.get(self.server.metrics_url, timeout=10)
        assert response.status_code == 200
        return response.text

    def metric(self, name: str, **labels: str | tuple[str, ...]) -> float:
        """The sum of a metric's samples with these labels (a tuple: any of them), read at one moment."""
        return sum(
            value
            for given, value in self.metrics().get(name, [])
            if all(given[label] in (w if isinstance(w, tuple) else (w,)) for label, w in labels.items())
        )

    # Memory, seen from outside.

    def segments(self) -> dict[int, Path]:
        """All KV segments that sessions hold now, by inode."""
        holders = [*self.server.processes("ray::Keeper"), *self.server.processes("ray::SessionActor")]
        found: dict[int, Path] = {}
        for process in holders:
            found.update(process.memory_files())
        return found

    def segment(self, session_id: str) -> Path:
        """The one segment of a session that has an actor."""
        pid = self.with_actor(session_id)["actor_pid"]
        [process] = [p for p in self.server.processes("ray::SessionActor") if p.pid == pid]
        [path] = process.memory_files().values()
        return path

    def stored_ids(self, session_id: str) -> list[int]:
        """The token ids in the session's segment."""
        with self.segment(session_id).open("rb") as file:
            file.seek(_FIELDS_OFFSET)
            num_tokens = _FIELDS.unpack(file.read(_FIELDS.size))[4]
            file.seek(PAGE)
            ids = array("i", file.read(4 * num_tokens))
        return ids.tolist()


@pytest.fixture(scope="module")
def client(server: Any, until: Callable[..., Any]) -> Iterator[Client]:
    """A client of the module's server."""
    client = Client(server, until)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="session")
def make_client(until: Callable[..., Any]) -> Callable[[Any], Client]:
    """For a test that starts servers of its own; the test closes the clients."""
    return lambda server: Client(server, until)


@pytest.fixture(scope="session")
def refused() -> type[Refused]:
    return Refused


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The default model's folder; the server has converted it already, or this does."""
    return resolve_model("smollm2", Config().cache_path, lambda event: None, None)


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(model_folder)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for a module's tests: it takes longer to start than most of them."""
    executable = shutil.which("chromium")
    if executable is None:
        told = "Debian's chromium is not installed, so the live page is not tested"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    chromium = Chromium(executable, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


@pytest.fixture
async def open_page(chromium: Chromium) -> AsyncIterator[Callable[..., Awaitable[Page]]]:
    """`await open_page(url, **context)`: the live page in a headless Chromium, in a context that nothing else has been
    in. Whatever the browser has to complain of (scripts that fail, what the page's policy forbids) fails the test."""
    complaints: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.connect_over_cdp(chromium.address)
        contexts: list[BrowserContext] = []

        async def open_page(url: str, **context: Any) -> Page:
            made = await browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **context})
            contexts.append(made)
            page = await made.new_page()
            page.set_default_timeout(30_000)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text) if _is_complaint(said) else None)
            await page.goto(f"{url}/ui")
            return page

        yield open_page
        for one in contexts:
            await one.close()
        await browser.close()
    assert complaints == []


def _is_complaint(said: ConsoleMessage) -> bool:
    # The server's own refusals are answers like others.
    return said.type in ("error", "warning") and "Failed to load resource" not in said.text
