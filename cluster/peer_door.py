"""The door for peers: where other replicas' turns come in, before anything of the edge.

Owns: the internal path, which is none to whoever cannot prove to belong to the cluster (nothing of theirs is read or
decoded: they get what an unknown path gets), and the answer's frames. Knows nothing of keys, of the routes inside, and
of how a turn is run. A turn that came in here is run here, and not sent on.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi_cluster.cluster.errors import NotFound, PhiError
from phi_cluster.cluster.http.disconnect import until_disconnect
from phi_cluster.cluster.http.errors import error_response, told_of
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.peer_link import TURNS_PATH
from phi_cluster.cluster.peer_proof import HEADER, Guard, Proven, digest_of
from phi_cluster.cluster.turn_api import TurnRequest, TurnRunner
from phi_cluster.cluster.turn_wire import MAX_FRAME_NBYTES, Sent, SentTurn, decode_turn, encode_frame

logger = logging.getLogger(__name__)

# Whoever waits knows within so many seconds that this process lives.
BEAT_SECONDS = 2.0
_BODY_SECONDS = 30.0


class Mover(Protocol):
    """Brings sessions to this node."""

    async def move_here(self, key: SessionKey, source_node_id: str) -> bool:
        """Fetches the session's memory from that node. False: it could not be had."""
        ...


class PeerDoor:
    """ASGI middleware, the outermost one. `guard` None: this process has no token, so it has no peers. `turns` runs
    turns here."""

    def __init__(
        self, app: ASGIApp, guard: Guard | None, turns: TurnRunner, mover: Mover, beat_seconds: float = BEAT_SECONDS
    ):
        self._app = app
        self._guard = guard
        self._turns = turns
        self._mover = mover
        self._beat_seconds = beat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guard is not None:
            given = [value for name, value in scope["headers"] if name == HEADER.encode()]
            if len(given) == 1:
                proven = self._guard.admit(scope["path"], given[0].decode("latin-1"))
                if proven is not None and scope["path"] == TURNS_PATH and scope["method"] == "POST":
                    await self._take(proven, scope, receive, send)
                    return
                if proven is not None:
                    # Whom another replica has let in is not sent on, and his answer has a proof.
                    scope = {**scope, "state": {**scope.get("state", {}), "is_relayed": True}}
                    send = _proving(send, self._guard.answer(proven))
        await self._app(scope, receive, send)

    async def _take(self, proven: Proven, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_body(receive), _BODY_SECONDS)
            if digest_of(body) != proven.digest:
                raise ValueError("another body than the proof's")
            sent = decode_turn(body)
        except (ValueError, asyncio.TimeoutError) as error:
            logger.warning("a peer's turn was not understood: %s", error)
            await error_response(NotFound("There is nothing here"), {"connection": "close"})(scope, receive, send)
            return
        assert self._guard is not None
        answer = _Frames(send)
        await answer.begin(self._guard.answer(proven))
        await until_disconnect(receive, self._run(sent, answer), answer.beat(self._beat_seconds))

    async def _run(self, sent: SentTurn, answer: _Frames) -> None:
        request = sent.request
        try:
            if sent.move_from is not None and request.session_id is not None:
                await self._mover.move_here(SessionKey(request.tenant, request.session_id), sent.move_from)
            async with aclosing(self._turns.run(request)) as events:
                async for event in events:
                    await answer.write(event)
        except Exception as error:
            await answer.write(_told(error, request))
        await answer.end()


class _Frames:
    """An answer's frames, one after the other."""

    def __init__(self, send: Send):
        self._send = send
        self._lock = asyncio.Lock()
        self._is_silent = True

    async def begin(self, proof: str) -> None:
        headers = [(b"content-type", b"application/octet-stream"), (HEADER.encode(), proof.encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        # So that the headers go out, whoever waits for more to send with them.
        await self.write(None)

    async def write(self, sent: Sent | None) -> None:
        self._is_silent = False
        await self._put({"type": "http.response.body", "body": encode_frame(sent), "more_body": True})

    async def end(self) -> None:
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def beat(self, seconds: float) -> None:
        """A sign of life wherever nothing else is said; without end."""
        while True:
            self._is_silent = True
            await asyncio.sleep(seconds)
            if self._is_silent:
                await self.write(None)

    async def _put(self, message: Message) -> None:
        async with self._lock:
            await self._send(message)


def _proving(send: Send, proof: str) -> Send:
    async def send_proof(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (HEADER.encode(), proof.encode())]}
        await send(message)

    return send_proof


async def _body(receive: Receive) -> bytes:
    """Raises ValueError if it does not come, or too much."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ValueError("the peer has left")
        body += message.get("body", b"")
        if len(body) > MAX_FRAME_NBYTES:
            raise ValueError("too long")
        if not message.get("more_body", False):
            return bytes(body)


def _told(error: Exception, request: TurnRequest) -> PhiError:
    return told_of(error, request.request_id)
