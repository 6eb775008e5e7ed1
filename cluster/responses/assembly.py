"""The parts of this room, put together over a state directory.

Owns: which part uses which, and the order of start and end. Knows nothing of what they do, and of who builds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.responses.conversing import ConversationKeeper
from phi_cluster.cluster.responses.database import ResponseDatabase
from phi_cluster.cluster.responses.forgetting import Forgetter
from phi_cluster.cluster.responses.making import MakerLimits, ResponseMaker
from phi_cluster.cluster.responses.run import Tools
from phi_cluster.cluster.responses.sqlite_conversations import SQLiteConversations
from phi_cluster.cluster.responses.sqlite_responses import SQLiteResponses
from phi_cluster.cluster.responses.store import SessionKeeping
from phi_cluster.cluster.responses.store_thread import StoreThread
from phi_cluster.cluster.responses.tending import Tender
from phi_cluster.cluster.responses.workshop import Rhythm, Surroundings, Workshop


class ResponseRoom:
    """`responses` and `conversations` are what the edge asks. Built in an event loop, for that loop."""

    def __init__(
        self,
        state_dir: Path,
        tools: Tools,
        sessions: SessionKeeping,
        limits: MakerLimits,
        process: ProcessId,
        is_alive: Callable[[ProcessId], bool],
        era: str,
        rhythm: Rhythm | None = None,
    ):
        """`process` is this one; `is_alive` tells of those that share the directory, within one `era` (the machine's
        boot)."""
        self._is_closed = False
        self._database = ResponseDatabase(state_dir)
        self._thread = StoreThread()
        store = SQLiteResponses(self._database)
        forgetter = Forgetter(store, sessions, self._thread)
        around = Surroundings(store, self._thread, tools, sessions, forgetter, rhythm or Rhythm())
        self._workshop = Workshop(around, limits.max_background, era)
        self._tender = Tender(around, self._workshop, limits.retention, process, is_alive)
        self.responses = ResponseMaker(around, self._workshop, limits, process)
        conversations = SQLiteConversations(self._database)
        self.conversations = ConversationKeeper(conversations, tools.clock, self._thread, forgetter)

    @property
    def num_in_background(self) -> int:
        """Responses in the background that are not over, running or not."""
        return self._workshop.num_in_background

    def start(self) -> None:
        """Begins to save and to tend."""
        self._tender.start()

    async def close(self) -> None:
        """Responses that are not over are left to the next process. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._tender.close()
        left = await self._workshop.close()
        with contextlib.suppress(PhiError):
            await self._tender.save(left)
        await self._thread.call(self._database.close)
        self._thread.close()
