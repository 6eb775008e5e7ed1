"""Server-sent events on an ASGI connection.

Owns: the format, the response's start (put off until there is something to say), the comment lines that keep
a silent stream alive, and its end. Knows nothing of turns and of what the events mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.http.errors import error_response, to_json

# Without an empty line behind it: that would end an event, and a decoder that has seen an id takes it for one without
# data (OpenAI's Python client fails then). The next event's lines follow it.
KEEP_ALIVE = b": keep-alive\n"
DONE = b"data: [DONE]\n\n"


class EventStream:
    """One response. Until the first write nothing is sent, so that an early failure gets a status of its own.

    `is_typed`: events have a `type`, which gets an `event:` line, and the stream ends with the last of them, without
    `[DONE]`, as those of OpenAI's Responses. `data_only`: no lines but those of data, for clients that take whatever
    comes for JSON.

    `keep_alive` runs beside the writer; a lock keeps whole events apart. After `end` or `fail` nothing more
    is sent. All but `keep_alive` raise `ClientDisconnect` if `send` does.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Mapping[str, str],
        *,
        is_typed: bool = False,
        data_only: bool = False,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._headers = dict(headers)
        self._is_typed = is_typed
        self._data_only = data_only
        self._lock = asyncio.Lock()
        self._started = False
        self._ended = False
        self._last_write = asyncio.get_running_loop().time()
        # Since when the client has not taken what is being sent.
        self._stuck_since: float | None = None

    def add_headers(self, headers: Mapping[str, str]) -> None:
        """Of a response that has not started yet; later they have no effect."""
        self._headers.update(headers)

    async def stuck(self, seconds: float) -> None:
        """Returns when the client has taken nothing for so long although there was something to send."""
        now = asyncio.get_running_loop().time
        while True:
            waited = 0.0 if self._stuck_since is None else now() - self._stuck_since
            if waited >= seconds:
                return
            await asyncio.sleep(seconds - waited)

    async def write(self, event: Mapping[str, Any], position: object = None) -> None:
        """Sends an event, with `position` as its id; the first call sends the status 200 and the headers."""
        id_line = b"" if position is None or self._data_only else f"id: {position}\n".encode()
        await self._write(id_line + self._block(event))

    async def write_all(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Several events at once, if there are any."""
        if events:
            await self._write(b"".join(map(self._block, events)))

    @property
    def has_started(self) -> bool:
        """Whether anything was sent."""
        return self._started

    async def end(self, *events: Mapping[str, Any]) -> None:
        """The last `events`, then `[DONE]`."""
        await self._write(b"".join(map(self._block, events)) + (b"" if self._is_typed else DONE), last=True)

    async def fail(self, error: PhiError) -> None:
        """`error` with its own status if nothing was sent yet, else as an event, followed by `[DONE]`.

        vLLM's clients know the event by its `error` field; the official client raises `APIError` on it.
        """
        async with self._lock:
            if self._started:
                early = None
            else:
                early = error_response(error, self._headers)
                self._started = self._ended = True
        if early is not None:
            await early(self._scope, self._receive, self._send)
        elif not self._ended:
            await self.end(error.body())

    async def keep_alive(self, interval: float) -> None:
        """Sends a comment whenever nothing was sent for `interval` seconds, until the end of the stream."""
        now = asyncio.get_running_loop().time
        while not self._ended and not self._data_only:
            silence = now() - self._last_write
            if silence < interval:
                await asyncio.sleep(interval - silence)
            else:
                try:
                    await self._write(KEEP_ALIVE)
                except ClientDisconnect:
                    return

    async def _write(self, body: bytes, last: bool = False) -> None:
        async with self._lock:
            if self._ended:
                return
            self._ended = last
            self._stuck_since = asyncio.get_running_loop().time()
            if not self._started:
                self._started = True
                start = {"type": "http.response.start", "status": 200, "headers": self._start_headers()}
                await self._send(start)
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})
            self._stuck_since = None
            self._last_write = asyncio.get_running_loop().time()

    def _block(self, event: Mapping[str, Any]) -> bytes:
        kind = f"event: {event['type']}\n".encode() if self._is_typed else b""
        return kind + b"data: " + to_json(event) + b"\n\n"

    def _start_headers(self) -> list[tuple[bytes, bytes]]:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            # Proxies like nginx would otherwise collect events before they pass them on.
            "x-accel-buffering": "no",
            **self._headers,
        }
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
