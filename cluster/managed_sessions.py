"""Sessions as users look after them, with the engine that serves them here.

Owns: adding the engine to their descriptions, and telling what was said as messages. Knows nothing of where sessions
are and what is done with them (session/directory.py), or of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.responses.store import Branch
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session_api import Download, ImportLimits, SessionPage, SessionQuery
from phi_cluster.cluster.spoken import SpokenReader


class ManagedSessions:
    """Adds to sessions' descriptions which engine serves them here (implements session_api.SessionAdmin, and what
    responses ask of sessions)."""

    def __init__(self, directory: SessionDirectory, engines: EngineClient, spoken: SpokenReader, node_id: str):
        """`node_id`: this node, on which the engine is."""
        self._node_id = node_id
        self._directory = directory
        self._spoken = spoken
        self._engines = engines

    async def browse(self, query: SessionQuery) -> SessionPage:
        page = await self._directory.browse(query)
        return replace(page, sessions=[self._with_engine(d) for d in page.sessions])

    async def get(self, tenant: str, session_id: str) -> dict[str, Any]:
        return self._with_engine(await self._directory.get(tenant, session_id))

    async def delete(self, tenant: str, session_id: str) -> None:
        await self._directory.delete(tenant, session_id)

    async def clear(self, tenant: str, session_id: str) -> dict[str, Any]:
        return self._with_engine(await self._directory.clear(tenant, session_id))

    async def hibernate(self, tenant: str, session_id: str) -> dict[str, Any]:
        return self._with_engine(await self._directory.hibernate(tenant, session_id))

    async def messages(self, tenant: str, session_id: str) -> list[dict[str, str]]:
        text = await self._directory.said(tenant, session_id)
        # A long one takes a while.
        return await asyncio.to_thread(self._spoken.messages, text)

    async def export(self, tenant: str, session_id: str, cache_up_to: int | None = None) -> Download:
        return await self._directory.export(tenant, session_id, cache_up_to)

    async def import_session(
        self, tenant: str, new_session_id: str | None, data: AsyncIterator[bytes], limits: ImportLimits
    ) -> dict[str, Any]:
        return self._with_engine(await self._directory.import_session(tenant, new_session_id, data, limits))

    async def fork(self, tenant: str, session_id: str, new_session_id: str | None, turn: int | None) -> dict[str, Any]:
        return self._with_engine(await self._directory.fork(tenant, session_id, new_session_id, turn))

    async def recycle(self, tenant: str, session_id: str) -> dict[str, Any]:
        return self._with_engine(await self._directory.recycle(tenant, session_id))

    async def branch(self, tenant: str, origin: Branch, session_id: str) -> None:
        """See store.SessionKeeping."""
        await self._directory.fork(tenant, origin.session_id, session_id, origin.num_turns)

    def _with_engine(self, description: dict[str, Any]) -> dict[str, Any]:
        engine = self._engines.engine
        is_here = description.get("node_id") in (None, self._node_id)
        return description | {"engine_pid": engine.process.pid if engine is not None and is_here else None}
