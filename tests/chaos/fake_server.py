"""A server for tests of the clients: it says the same words for the same question, and breaks as it is told.

Owns: a few lines of HTTP and SSE. Knows nothing of models and sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.history import Expected
from tests.chaos.scripts import Script
from tests.chaos.talker import cut_text

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def reply_of(body: dict[str, Any]) -> list[str]:
    """The tokens that are said to a request."""
    asked = "".join(message["content"] for message in body["messages"])
    return [f"{WORDS[(len(asked) + index) % len(WORDS)]} " for index in range(body["max_tokens"])]


def said(script: Script) -> list[Expected]:
    """The replies to the turns of a script, one after the other, at each position."""
    found: list[Expected] = []
    messages = []
    for index, turn in enumerate(script.turns):
        messages.append({"content": turn.content})
        tokens = reply_of({"messages": messages, **turn.fields})
        prefixes = {n + 1: "".join(tokens[: n + 1]) for n in range(len(tokens))}
        found.append(Expected(script.name, index, "".join(tokens), "length", 7, len(tokens), script.canary, prefixes))
        reply = cut_text(turn, found[-1])
        messages.append({"content": found[-1].text if reply is None else reply})
    return found


@dataclass
class Behaviour:
    """Of one answer: breaks, fails or hangs behind so many tokens, or refuses with a status."""

    break_after: int | None = None
    status: int = 200
    code: str = "no"
    error_after: int | None = None
    hang_after: int | None = None
    strange: bytes = b""


class FakeServer:
    """`behaviours` are for the next requests, in order; then all goes well. `requests` are those that came."""

    def __init__(self) -> None:
        self.behaviours: list[Behaviour] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.left: list[str] = []
        self.gap = 0.0
        self.port = 0
        self.state_dir = self.runtime_dir = Path()
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.left.append(type(error).__name__)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        raw = await reader.readexactly(int(headers["content-length"]))
        body = json.loads(raw) if raw else {}
        self.requests.append((headers, body))
        behaviour = self.behaviours.pop(0) if self.behaviours else Behaviour()
        if behaviour.status != 200 or not body:
            text = json.dumps({"error": {"message": "no", "code": behaviour.code}}).encode()
            writer.write(f"HTTP/1.1 {behaviour.status} X\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
            await writer.drain()
            return
        await self._stream(reader, writer, headers, body, behaviour)

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        headers: dict[str, str],
        body: dict[str, Any],
        behaviour: Behaviour,
    ) -> None:
        request_id = headers.get("x-request-id", uuid.uuid4().hex)
        writer.write(f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-request-id: {request_id}\r\n\r\n".encode())
        tokens = reply_of(body)
        start = int(headers.get("x-resume-from", "0"))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            for position in range(start + 1, len(tokens) + 1):
                done = position - 1 - start
                if behaviour.break_after == done:
                    return
                if behaviour.hang_after == done:
                    await asyncio.sleep(3600)
                if behaviour.error_after == done:
                    _write(writer, b'data: {"error":{"message":"no","code":"no"}}\n\ndata: [DONE]\n\n')
                    break
                _event(writer, tokens[position - 1], position)
                await writer.drain()
                await asyncio.sleep(self.gap)
                if gone.done():
                    with contextlib.suppress(OSError):
                        gone.result()
                        self.left.append("FIN")
                        return
                    self.left.append("RST")
                    return
            else:
                closing = {"choices": [{"delta": {}, "finish_reason": "length"}]}
                usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(tokens)}}
                _write(writer, f"data: {json.dumps(closing)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
            if behaviour.strange:
                _write(writer, behaviour.strange)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            gone.cancel()


def _event(writer: asyncio.StreamWriter, text: str, position: int) -> None:
    data = json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": None}]})
    _write(writer, f": a comment\n\nid: {position}\ndata: {data}\n\n".encode())


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    # In two chunks: events need not come whole.
    for part in (data[:9], data[9:]):
        writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
