"""The way from this replica to a peer: a turn is sent there, its events come back as they are said.

Owns: the HTTP request (one connection a turn, whose end is the turn's), and knowing that a peer is gone: it says
something every few seconds, whatever the turn does. Knows nothing of why a turn goes there and of what is done when it
is lost.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator

import aiohttp

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.peer_proof import HEADER, ClusterKey
from phi_cluster.cluster.peers import PeerReplica
from phi_cluster.cluster.turn_api import TurnEvent, TurnFinished
from phi_cluster.cluster.turn_wire import FrameReader, SentTurn, encode_turn

TURNS_PATH = "/internal/turns"
# Peers are on the same network.
_CONNECT_SECONDS = 2.0
# Several times what may lie between two words of a peer (peer_door.py).
_SILENCE_SECONDS = 15.0
_READ_NBYTES = 2**16


class PeerLost(Exception):
    """The peer, or the way there, is gone. `may_have_begun`: it had been asked."""

    def __init__(self, peer: PeerReplica, reason: str, *, may_have_begun: bool):
        super().__init__(f"replica {peer.replica_id[:12]} at {peer.address}: {reason}")
        self.may_have_begun = may_have_begun


class PeerLinks:
    """For one event loop; `close` at the end."""

    def __init__(self, key: ClusterKey, silence_seconds: float = _SILENCE_SECONDS):
        self._key = key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silence_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def run(self, peer: PeerReplica, sent: SentTurn) -> AsyncGenerator[TurnEvent, None]:
        """The turn's events, as it is run there. Raises what it raises there, and PeerLost. Closing this ends the turn
        there."""
        body = encode_turn(sent)
        proof, expected = self._key.prove(peer.replica_id, TURNS_PATH, body)
        may_have_begun = False
        try:
            url = f"http://{peer.address}{TURNS_PATH}"
            async with self._client().post(url, data=body, headers={HEADER: proof}) as response:
                try:
                    if not hmac.compare_digest(response.headers.get(HEADER, "").encode(), expected.encode()):
                        # Another one has its port by now, or it is of another version.
                        raise PeerLost(peer, f"no answer of ours (status {response.status})", may_have_begun=False)
                    may_have_begun = True
                    reader = FrameReader()
                    while data := await response.content.read(_READ_NBYTES):
                        for one in reader.take(data):
                            if isinstance(one, PhiError):
                                raise one
                            yield one
                            if isinstance(one, TurnFinished):
                                return
                finally:
                    # Also where something is left to read: what nobody reads is not computed.
                    response.close()
        except aiohttp.ClientConnectorError as error:
            raise PeerLost(peer, type(error).__name__, may_have_begun=False) from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            # Asked, perhaps: an answer that was lost is no proof that nothing was done.
            raise PeerLost(peer, type(error).__name__, may_have_begun=True) from None
        raise PeerLost(peer, "it has left", may_have_begun=may_have_begun)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A connection that is kept may be closed by the other end just when it is used again; and a new one costs
            # less than finding out what became of the turn.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return self._session
