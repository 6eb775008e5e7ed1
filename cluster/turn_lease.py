"""The KV memory of a growing reply: leased a piece at a time, ahead of the tokens.

Owns: when to ask for more, and what a refusal means. Knows nothing of text, journals or Ray.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.sequence_stream import SequenceStream


class Lessor(Protocol):
    """Whoever has the node's KV memory."""

    async def reserve(self, key: SessionKey, num_tokens: int, num_shared_tokens: int = 0) -> None:
        """Leases KV memory for the session to hold `num_tokens`, of which the first have their keys and values in
        another one's. Raises Overloaded."""
        ...

    async def settle_early(self, key: SessionKey) -> None:
        """The session's turn goes on, with the memory that it has now: the rest of its lease is others'."""
        ...


class TurnLease:
    """One turn's. `limit`: so many tokens at most, of which `piece` are leased at a time. For one event loop."""

    def __init__(
        self, lessor: Lessor, engines: EngineClient, key: SessionKey, stream: SequenceStream, limit: int, piece: int
    ):
        self._lessor = lessor
        self._engines = engines
        self._key = key
        self._stream = stream
        self._piece = piece
        self._limit = limit
        self._growing: asyncio.Task[None] | None = None
        self.refusal: Exception | None = None

    def follow(self, num_tokens: int) -> None:
        """The sequence has so many tokens: asks for more memory before it has to pause."""
        covered = self._stream.add.max_num_tokens
        if self._growing is None and covered < self._limit and num_tokens + self._piece // 4 >= covered:
            self._growing = asyncio.get_running_loop().create_task(self._grow(min(covered + self._piece, self._limit)))

    async def _grow(self, covered: int) -> None:
        try:
            shared = self._stream.add.shared
            await self._lessor.reserve(self._key, covered, 0 if shared is None else shared.num_tokens)
            self._engines.extend(self._stream, covered)
        except Exception as error:
            # Whatever it is: without more memory the sequence would pause for ever.
            self.refusal = error
            self._engines.abort(self._stream)
        finally:
            self._growing = None
