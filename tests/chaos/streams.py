"""A client as close to the wire as can be: one request a connection, every event with its moment and position.

Owns: HTTP and SSE as they are read here, and how a client leaves: by a FIN or a RST. Knows nothing of conversations,
of repeating requests, and of what ought to come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.chaos.history import Attempt, Event

CHAT = "/v1/chat/completions"


class Broken(Exception):
    """The connection ended before the response did."""


@dataclass(frozen=True)
class Address:
    host: str
    port: int


@dataclass
class Answer:
    """A whole response. Status 0: there was none."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def is_ours(self) -> bool:
        """Whether the server itself has answered, not a proxy that found nobody behind it."""
        return self.status == 200 or self.body.startswith(b'{"error"')


class Connection:
    """One request on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(
        cls, address: Address, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Connection:
        """Sends the request. Raises OSError."""
        reader, writer = await asyncio.open_connection(address.host, address.port)
        lines = [
            f"{method} {path} HTTP/1.1",
            f"host: {address.host}:{address.port}",
            "connection: close",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return cls(reader, writer)

    async def read_head(self) -> None:
        """Raises Broken."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Broken(f"no response: {type(error).__name__}") from None
        status_line, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(status_line.split(" ")[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Broken."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readuntil(b"\r\n")
            elif "content-length" in self.headers:
                yield await self._reader.readexactly(int(self.headers["content-length"]))
            else:
                yield await self._reader.read()
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Broken(f"in the middle: {type(error).__name__}") from None

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    def leave(self, how: str = "fin") -> None:
        """Ends the connection at once: `fin` says so orderly, `rst` does not even do that."""
        sock = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if how == "rst":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sock.shutdown(socket.SHUT_RDWR)
        self._writer.transport.abort()


async def ask(
    address: Address, method: str, path: str, headers: Mapping[str, str] | None = None, timeout: float = 30.0
) -> Answer:
    """A small request and its whole answer; status 0 if there is none in time."""
    try:
        return await asyncio.wait_for(_ask(address, method, path, headers), timeout)
    except (OSError, Broken, asyncio.TimeoutError):
        return Answer(0, b"", {})


async def _ask(address: Address, method: str, path: str, headers: Mapping[str, str] | None) -> Answer:
    connection = await Connection.open(address, method, path, headers=headers)
    try:
        await connection.read_head()
        return Answer(connection.status, await connection.body(), connection.headers)
    finally:
        connection.leave()


class Stream:
    """One attempt at a turn, while it runs. `on_text` is called after each piece of text."""

    def __init__(self, attempt: Attempt, on_text: Callable[[Stream], None] | None = None):
        self.attempt = attempt
        self._on_text = on_text
        self._connection: Connection | None = None

    async def run(self, address: Address, body: Mapping[str, Any], headers: Mapping[str, str], timeout: float) -> None:
        """Reads to the end, whatever that is, and writes it down."""
        try:
            await asyncio.wait_for(self._run(address, json.dumps(body).encode(), headers), timeout)
        except asyncio.TimeoutError:
            self._end("late", f"nothing final within {timeout:g} s")
        except Broken as error:
            self._end("broken", str(error))
        except OSError as error:
            # No connection, or one that was gone before the request was sent.
            self._end("refused", type(error).__name__)
        finally:
            self.attempt.ended = time.monotonic()
            if self._connection is not None:
                self._connection.leave()

    async def _run(self, address: Address, body: bytes, headers: Mapping[str, str]) -> None:
        sent = {"content-type": "application/json", **headers}
        self._connection = await Connection.open(address, "POST", CHAT, body, sent)
        await self._connection.read_head()
        await self._read(self._connection)

    def cut(self, how: str, by: str) -> None:
        """Leaves in the middle; `run` returns soon."""
        attempt = self.attempt
        # Behind [DONE] there is nothing left to be cut off from.
        if attempt.ending == "open" and not attempt.dones and self._connection is not None:
            attempt.ending, attempt.cut_by = "cut", by
            self._connection.leave(how)

    def _end(self, ending: str, why: str = "") -> None:
        if self.attempt.ending == "open":
            self.attempt.ending, self.attempt.why = ending, why

    async def _read(self, connection: Connection) -> None:
        attempt = self.attempt
        attempt.status = connection.status
        attempt.request_id = connection.headers.get("x-request-id")
        if connection.status != 200:
            body = await connection.body()
            with contextlib.suppress(ValueError):
                attempt.errors.append(json.loads(body)["error"])
            self._end("refused", f"{connection.status} {body[:300].decode(errors='replace')}")
            return
        left = b""
        async for piece in connection.pieces():
            *events, left = (left + piece).split(b"\n\n")
            for event in events:
                self._take(event.decode())
        if any(line and not line.startswith(b":") for line in left.split(b"\n")):
            attempt.strays += 1
        if attempt.dones:
            self._end("error" if attempt.errors else "done")
        else:
            self._end("broken", "the response ended without [DONE]")

    def _take(self, event: str) -> None:
        attempt, now = self.attempt, time.monotonic()
        event_id: str | None = None
        for line in event.split("\n"):
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif name == "data":
                if attempt.dones:
                    attempt.strays += 1
                elif value == "[DONE]":
                    attempt.dones += 1
                else:
                    self._take_data(json.loads(value), event_id, now)

    def _take_data(self, data: dict[str, Any], event_id: str | None, now: float) -> None:
        attempt = self.attempt
        if "error" in data:
            attempt.errors.append(data["error"])
            return
        if usage := data.get("usage"):
            attempt.prompt_tokens, attempt.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in data["choices"]:
            if text := choice["delta"].get("content"):
                # So many tokens, and a checksum.
                position = None if event_id is None else int(event_id.partition("-")[0])
                attempt.events.append(Event(now, text, position, event_id))
                if self._on_text is not None:
                    self._on_text(self)
            if choice["finish_reason"] is not None:
                attempt.closings += 1
                attempt.finish_reason = choice["finish_reason"]
