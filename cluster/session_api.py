"""What the HTTP edge asks of sessions: one of them, or all of a tenant's in pages.

Owns: the query for a page, the page, files that are exported, and the protocol of whoever looks after sessions. A leaf:
the edge calls it, `managed_sessions` implements it, tests fake it. Knows nothing of HTTP, Ray, actors and journals.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import RawIOBase
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, get_args

SessionSort: TypeAlias = Literal["id", "kv_cache_bytes", "age", "idle", "tokens", "turns"]
SessionState: TypeAlias = Literal["active", "held", "hibernated", "stored"]
SESSION_SORTS: tuple[SessionSort, ...] = get_args(SessionSort)
SESSION_STATES: tuple[SessionState, ...] = get_args(SessionState)
# Of a download, in memory at once.
_CHUNK_NBYTES = 2**18


@dataclass(frozen=True)
class SessionQuery:
    """One page of a node's named sessions. `tenant` None: of all tenants. `after` is the cursor that the page before
    ended with (see `SessionPage.last`). `search`: ids that have it in them, whatever the case; `node_id`: those in the
    memory of the node whose id begins so."""

    tenant: str | None
    limit: int
    after: str | None = None
    sort: SessionSort = "id"
    is_descending: bool = False
    state: SessionState | None = None
    node_id: str | None = None
    search: str | None = None


@dataclass(frozen=True)
class SessionPage:
    """`sessions` are described as `SessionAdmin` says, with their `tenant`. `totals` are of all that the query
    finds, not of the page alone: sessions, by_state, kv_cache_bytes, disk_bytes. `last`: the cursor for the next page,
    None on an empty one."""

    sessions: list[dict[str, Any]]
    totals: dict[str, Any]
    has_more: bool
    last: str | None


@dataclass(frozen=True)
class ImportLimits:
    """Of a file that is imported: ids are below `vocab_size`, the turns in it take no more than `max_turns_nbytes`."""

    vocab_size: int
    max_turns_nbytes: int


@dataclass
class Download:
    """A file to be read a piece at a time: `nbytes` from where `file` is. Whoever has it closes it."""

    file: BinaryIO | RawIOBase
    nbytes: int

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its bytes, in order. Raises OSError, also if there are too few."""
        left = self.nbytes
        while left:
            chunk = await asyncio.to_thread(self.file.read, min(left, _CHUNK_NBYTES))
            if not chunk:
                raise OSError("the file ends too early")
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        self.file.close()


class SessionAdmin(Protocol):
    """Looks after the sessions of a tenant. Raises `NotFound`; while a turn is running perhaps `SessionBusy`.

    A session is described by a JSON-able dict: id, state, num_tokens, kv_cache_bytes, process_bytes, turns,
    age_seconds, idle_seconds, activation, recycles, holder, node_id, actor_pid, engine_pid.
    """

    async def browse(self, query: SessionQuery) -> SessionPage:
        """A page of the named sessions. Raises `InvalidRequest` if its place is gone."""
        ...

    async def get(self, tenant: str, session_id: str) -> dict[str, Any]: ...

    async def delete(self, tenant: str, session_id: str) -> None: ...

    async def clear(self, tenant: str, session_id: str) -> dict[str, Any]:
        """Forget the conversation and its KV cache; the session stays. Returns its new description."""
        ...

    async def recycle(self, tenant: str, session_id: str) -> dict[str, Any]:
        """Give the session a new actor that takes over the same memory; returns its new description."""
        ...

    async def hibernate(self, tenant: str, session_id: str) -> dict[str, Any]:
        """The session leaves memory, its cache goes to the disk; returns its new description."""
        ...

    async def messages(self, tenant: str, session_id: str) -> list[dict[str, str]]:
        """What was said, oldest first: each message's `role` and `content`. Raises `InvalidRequest` where it was not
        said in messages."""
        ...

    async def export(self, tenant: str, session_id: str, cache_up_to: int | None = None) -> Download:
        """The session's turns as a file; with as much of its KV cache as makes the file no longer than `cache_up_to`
        bytes (None: with none of it)."""
        ...

    async def import_session(
        self, tenant: str, new_session_id: str | None, data: AsyncIterator[bytes], limits: ImportLimits
    ) -> dict[str, Any]:
        """A session made of such a file (None: under a name that is made for it); returns its description. Raises
        `SessionExists`, `InvalidRequest` for a file that is not one, and what `data` raises."""
        ...

    async def fork(self, tenant: str, session_id: str, new_session_id: str | None, turn: int | None) -> dict[str, Any]:
        """A new session (None: under a name that is made for it) with the same conversation, as it was after the
        `turn`-th turn of those that it consists of (None: as it is), and a copy of its KV cache. Returns the new one's
        description. Raises `SessionExists`, and `InvalidRequest` if there are fewer turns."""
        ...
