"""All named sessions of a node, seen at once: found, sorted, counted and told in pages.

Owns: the pages. Knows nothing of who asks, of how journals are read, and of how a session is looked after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phi_cluster.cluster.errors import InvalidRequest, PhiError
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.administration import Administration
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.glances import Glances
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.journal import Glance
from phi_cluster.cluster.session.reports import stored_description
from phi_cluster.cluster.session.roster import Entry
from phi_cluster.cluster.session.session import SessionStats
from phi_cluster.cluster.session_api import SESSION_STATES, SessionPage, SessionQuery, SessionSort


@dataclass(eq=False)
class _Row:
    """A session: in memory with `stats`, which may be a second old, or only on the disk, as `seen` there."""

    key: SessionKey
    state: str
    entry: Entry | None = None
    stats: SessionStats | None = None
    disk_nbytes: int | None = None
    seen: Glance | None = None

    @property
    def kv_nbytes(self) -> int:
        return 0 if self.stats is None else self.stats.kv_cache_bytes


@dataclass(frozen=True)
class Known:
    """What a node knows of a session without describing it. `measure`: what the list is sorted by; `last_used`: of
    memory, wall clock in seconds (0: there is none here)."""

    key: SessionKey
    state: str
    kv_nbytes: int
    disk_nbytes: int | None
    measure: Any
    last_used: float

    @property
    def is_in_memory(self) -> bool:
        return self.state in ("active", "held")


class Row(Protocol):
    """What pages are made of."""

    @property
    def key(self) -> SessionKey: ...

    @property
    def state(self) -> str: ...

    @property
    def kv_nbytes(self) -> int: ...

    @property
    def disk_nbytes(self) -> int | None: ...


class Catalog:
    """For one event loop."""

    def __init__(
        self,
        custody: Custody,
        hibernation: Hibernation,
        administration: Administration,
        glances: Glances,
        node_id: str,
    ):
        self._custody = custody
        self._hibernation = hibernation
        self._administration = administration
        self._node_id = node_id
        self._glances = glances

    async def browse(self, query: SessionQuery) -> SessionPage:
        """Raises InvalidRequest if the cursor's session is not in the list any more (by `id` that does not matter)."""
        rows = self._rows(query)
        if query.sort in _BY_JOURNAL:
            await self._look_at(rows)
        now = self._custody.settings.clock()
        # Python's sort is stable: equal ones stay in order of their ids, whichever way they go.
        rows.sort(key=identity, reverse=query.is_descending and query.sort == "id")
        if query.sort != "id":
            measure = _MEASURES[query.sort]
            rows.sort(key=lambda row: measure(row, now), reverse=query.is_descending)
        begin = place_of(rows, query)
        page = rows[begin : begin + query.limit]
        await self._look_at(page)
        return SessionPage(
            sessions=[one for row in page if (one := await self._described(row)) is not None],
            totals=totals_of(rows),
            has_more=begin + query.limit < len(rows),
            last=cursor_of(page[-1], query) if page else None,
        )

    async def survey(self, query: SessionQuery, *, only_held: bool) -> list[Known]:
        """All that the query finds, whatever page is asked for. `only_held`: that this node has in memory or on its
        disk; others know of the rest."""
        rows = [row for row in self._rows(query) if not only_held or row.entry or row.disk_nbytes is not None]
        if query.sort in _BY_JOURNAL:
            await self._look_at(rows)
        now = self._custody.settings.clock()
        measure = _MEASURES.get(query.sort, _none)
        return [
            Known(
                *(row.key, row.state, row.kv_nbytes, row.disk_nbytes, measure(row, now)),
                last_used=0.0 if row.stats is None else now - row.stats.idle_seconds,
            )
            for row in rows
        ]

    async def described(self, keys: Sequence[SessionKey]) -> list[dict[str, Any] | None]:
        """Each session as it is here; None: deleted meanwhile, or it cannot be read."""
        rows = [self._row(key) for key in keys]
        await self._look_at(rows)
        return [await self._described(row) for row in rows]

    def _rows(self, query: SessionQuery) -> list[_Row]:
        roster = self._custody.roster
        keys = roster.stored_keys() if query.tenant is None else list(roster.named(query.tenant).values())
        wanted = None if query.search is None else query.search.lower()
        rows = (self._row(key) for key in keys if wanted is None or wanted in key.session_id.lower())
        return [row for row in rows if query.state in (None, row.state) and self._is_at(row, query.node_id)]

    def _row(self, key: SessionKey) -> _Row:
        entry = self._custody.roster.find(key)
        if entry is None:
            disk_nbytes = self._hibernation.nbytes(key)
            return _Row(key, "stored" if disk_nbytes is None else "hibernated", disk_nbytes=disk_nbytes)
        stats = entry.last_stats if entry.session is None else entry.session.describe()
        return _Row(key, "held" if entry.actor is None else "active", entry, stats)

    def _is_at(self, row: _Row, node_id: str | None) -> bool:
        return node_id is None or (row.entry is not None and self._node_id.startswith(node_id))

    async def _look_at(self, rows: Sequence[_Row]) -> None:
        unknown = [row for row in rows if row.entry is None and row.seen is None]
        found = await self._glances.look_at(row.key for row in unknown)
        for row in unknown:
            row.seen = found[row.key.digest]

    async def _described(self, row: _Row) -> dict[str, Any] | None:
        """Fresh; None: deleted meanwhile, or its journal cannot be read, and the others are worth showing."""
        if row.entry is None and self._custody.roster.find(row.key) is None:
            if row.seen is None or not self._custody.roster.is_known(row.key):
                return None
            now = self._custody.settings.clock()
            described = stored_description(row.key.session_id, row.seen, now, self._hibernation.nbytes(row.key))
        else:
            try:
                described = await self._administration.describe(row.key)
            except PhiError:
                return None
        return described | {"tenant": row.key.tenant}


def _none(row: _Row, now: float) -> int:
    return 0


def identity(row: Row) -> tuple[str, str]:
    return row.key.session_id, row.key.tenant


def _age(row: _Row, now: float) -> float:
    if row.stats is not None:
        return row.stats.age_seconds
    return 0.0 if row.seen is None else now - row.seen.created_at


def _idle(row: _Row, now: float) -> float:
    if row.stats is not None:
        return row.stats.idle_seconds
    return 0.0 if row.seen is None else now - row.seen.last_used


def _tokens(row: _Row, now: float) -> float:
    return row.stats.num_tokens if row.stats is not None else 0 if row.seen is None else row.seen.num_tokens


def _turns(row: _Row, now: float) -> float:
    return row.stats.turns if row.stats is not None else 0 if row.seen is None else row.seen.turns


def _kv_cache_bytes(row: _Row, now: float) -> tuple[int, int]:
    return row.kv_nbytes, row.disk_nbytes or 0


_MEASURES: dict[SessionSort, Callable[[_Row, float], Any]] = {
    "age": _age,
    "idle": _idle,
    "tokens": _tokens,
    "turns": _turns,
    "kv_cache_bytes": _kv_cache_bytes,
}
_BY_JOURNAL = ("age", "idle", "tokens", "turns")


def cursor_of(row: Row, query: SessionQuery) -> str:
    """A session's id; of all tenants, with its tenant before it: ids are unique within one."""
    return row.key.session_id if query.tenant is not None else f"{row.key.tenant}/{row.key.session_id}"


def place_of(rows: Sequence[Row], query: SessionQuery) -> int:
    """Where the page begins."""
    if query.after is None:
        return 0
    if query.sort == "id":
        tenant, _, session_id = query.after.rpartition("/")
        here = session_id, tenant or query.tenant or ""
        for number, row in enumerate(rows):
            if identity(row) < here if query.is_descending else identity(row) > here:
                return number
        return len(rows)
    for number, row in enumerate(rows):
        if cursor_of(row, query) == query.after:
            return number + 1
    raise InvalidRequest("after: that session is not in this list any more; begin with the first page", param="after")


def totals_of(rows: Sequence[Row]) -> dict[str, Any]:
    states = Counter(row.state for row in rows)
    return {
        "sessions": len(rows),
        "by_state": {state: states[state] for state in SESSION_STATES},
        "kv_cache_bytes": sum(row.kv_nbytes for row in rows),
        "disk_bytes": sum(row.disk_nbytes or 0 for row in rows),
    }
