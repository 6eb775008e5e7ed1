"""Requests about what the head node stores (responses and conversations) are answered there, whichever node they reach.

Owns: the way there and back of such a request as it is, key and all: the head's replica lets it in as if it had come
there. Once: who has been sent on is not sent on again. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from typing import Any

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from phi_cluster.cluster.errors import PhiError, Unavailable
from phi_cluster.cluster.http.body import read_bytes
from phi_cluster.cluster.http.caller import REQUEST_ID_HEADER
from phi_cluster.cluster.http.disconnect import until_disconnect
from phi_cluster.cluster.http.edge import EdgeSettings
from phi_cluster.cluster.http.errors import OnError, error_response
from phi_cluster.cluster.peer_proof import HEADER, ClusterKey
from phi_cluster.cluster.peers import PeerReplica, PeerTable

_PREFIXES = ("/v1/responses", "/v1/conversations")
_CONNECT_SECONDS = 2.0
_TRIES = 3
# A connection's own, not the request's.
_NOT_PASSED_ON = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "trailer", "upgrade", "expect", HEADER}
)
# A machine that is gone says nothing: it is noticed after some fifteen seconds.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 3), (socket.TCP_KEEPCNT, 3))


class HeadClient:
    """What a replica asks the head's with. For one event loop; `close` at the end."""

    def __init__(self, key: ClusterKey, peers: PeerTable):
        self._key = key
        self._peers = peers
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether another node is the head."""
        return self._peers.head_node_id not in (None, self._peers.node_id)

    async def ask(self, scope: Scope, body: bytes) -> tuple[aiohttp.ClientResponse, PeerReplica]:
        """Its answer begins. Raises Unavailable if none of the head's replicas can be reached."""
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name.decode("latin-1").lower() not in _NOT_PASSED_ON
        ]
        path, query = scope["raw_path"].decode("ascii"), scope["query_string"].decode("ascii")
        for _ in range(_TRIES):
            peer = self._peers.replica_on(self._peers.head_node_id or "")
            if peer is None:
                break
            proof, expected = self._key.prove(peer.replica_id, scope["path"], b"")
            url = URL(f"http://{peer.address}{path}{'?' if query else ''}{query}", encoded=True)
            try:
                response = await self._client().request(
                    scope["method"], url, headers=[*headers, (HEADER, proof)], data=body, allow_redirects=False
                )
            except aiohttp.ClientConnectorError:
                # Nothing has been asked yet.
                self._peers.suspect(peer)
                continue
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                self._peers.suspect(peer)
                break
            if hmac.compare_digest(response.headers.get(HEADER, "").encode(), expected.encode()):
                return response, peer
            response.close()
            self._peers.suspect(peer)
        raise Unavailable("the node that keeps responses and conversations cannot be reached; try again", retry_after=1)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_socket)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self._session


class HeadRelay:
    """ASGI middleware, inside of the door: who has no key comes no further."""

    def __init__(self, app: ASGIApp, head: HeadClient, settings: EdgeSettings, on_error: OnError):
        self._app = app
        self._head = head
        self._settings = settings
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_here = (
            scope["type"] != "http"
            or not self._head.is_elsewhere
            or scope["state"].get("is_relayed", False)
            or not any(scope["path"] == one or scope["path"].startswith(f"{one}/") for one in _PREFIXES)
        )
        if is_here:
            await self._app(scope, receive, send)
            return
        try:
            body = await read_bytes(Request(scope, receive), self._settings)
        except PhiError as error:
            await self._fail(error, scope, receive, send)
            return
        await until_disconnect(receive, self._relay(body, scope, receive, send))

    async def _relay(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response, _ = await self._head.ask(scope, body)
        except Unavailable as error:
            await self._fail(error, scope, receive, send)
            return
        try:
            # As the head's log has it.
            scope["state"]["request_id"] = response.headers.get(REQUEST_ID_HEADER, scope["state"]["request_id"])
            headers = [(name.lower(), value) for name, value in response.raw_headers if _is_passed_on(name)]
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            async for data in response.content.iter_any():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except (aiohttp.ClientError, OSError) as error:
            # The answer is torn, as if this replica had died: its client reads on.
            raise ClientDisconnect from error
        finally:
            response.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, error: PhiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._on_error(error.status, error.code)
        await error_response(error)(scope, receive, send)


def _is_passed_on(name: bytes) -> bool:
    return name.decode("latin-1").lower() not in _NOT_PASSED_ON


def _socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
