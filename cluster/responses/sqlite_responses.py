"""Responses in the SQLite file (implements store.ResponseStore).

Owns: who makes a response, what becomes of it, and what goes with it when it is deleted or expires. Knows nothing of
turns and of what the sessions hold; where a response belongs is sqlite_places.py's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import OPEN, ItemPage, NewResponse, Page, Response
from phi_cluster.cluster.responses import sqlite_items
from phi_cluster.cluster.responses.database import ResponseDatabase, pack
from phi_cluster.cluster.responses.sqlite_conversations import delete_conversation, doom_session, touch_conversation
from phi_cluster.cluster.responses.sqlite_places import context_of, place_of, resolved
from phi_cluster.cluster.responses.sqlite_rows import (
    COLUMNS,
    IS_OPEN,
    Row,
    delete_row,
    existing_row,
    find_row,
    insert_row,
    outcome_of,
    response_of,
)
from phi_cluster.cluster.responses.store import Begun, Progress, Unfinished, Verdict


class SQLiteResponses:
    def __init__(self, database: ResponseDatabase, expired_at_once: int = 500):
        """`expired_at_once`: other replicas wait for so many to be deleted."""
        self._database = database
        self._expired_at_once = expired_at_once

    def begin(self, new: NewResponse, now: float, owner: ProcessId, claim: str) -> Begun:
        with self._database.transaction(write=new.store) as connection:
            place = place_of(connection, new)
            new = resolved(connection, new)
            response = Response(new, now, "queued" if new.background else "in_progress")
            context = context_of(connection, new.tenant, place.context_id, place.conversation_id, place.context_end)
            if new.store:
                insert_row(connection, response, place, owner, claim)
            return Begun(response, place.session_id, claim, context, place.branch)

    def save(self, progress: Sequence[Progress]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        with self._database.transaction() as connection:
            for one in progress:
                row = find_row(connection, one.tenant, one.response_id)
                if row is None or row.claim != one.claim or row.status not in OPEN:
                    verdicts.append("lost")
                    continue
                if one.pieces:
                    values = (row.number, one.first, pack(one.pieces))
                    connection.execute("INSERT OR REPLACE INTO progress VALUES (?, ?, ?)", values)
                if one.has_started and row.status == "queued":
                    connection.execute("UPDATE responses SET status = 'in_progress' WHERE number = ?", (row.number,))
                verdicts.append("to be cancelled" if row.cancel_wished else "goes on")
        return verdicts

    def end(self, response: Response, claim: str) -> bool:
        new = response.asked
        with self._database.transaction() as connection:
            row = find_row(connection, new.tenant, response.id)
            if row is None or row.claim != claim or row.status not in OPEN:
                return False
            connection.execute(
                "UPDATE responses SET status = ?, ended_at = ?, outcome = ? WHERE number = ?",
                (response.status, response.ended_at, outcome_of(response), row.number),
            )
            connection.execute("DELETE FROM progress WHERE response = ?", (row.number,))
            if row.conversation_id is not None and (response.status != "failed" or response.pieces):
                now = response.ended_at or row.created_at
                said = [*sqlite_items.all_of(connection, row.tenant, row.id), *response.output(with_logprobs=False)]
                if _exists(connection, row.tenant, row.conversation_id):
                    sqlite_items.add(connection, row.tenant, row.conversation_id, said)
                    touch_conversation(connection, row.tenant, row.conversation_id, now)
        return True

    def drop(self, tenant: str, response_id: str, claim: str) -> None:
        with self._database.transaction() as connection:
            row = find_row(connection, tenant, response_id)
            if row is not None and row.claim == claim:
                delete_row(connection, row)
                if not _has_responses(connection, tenant, row.session_id) and row.conversation_id is None:
                    # Nobody will ever name the session that was to be.
                    doom_session(connection, tenant, row.session_id)
        self._database.soil()

    def find(self, tenant: str, response_id: str, after: int = 0) -> Response:
        with self._database.transaction(write=False) as connection:
            return response_of(connection, existing_row(connection, tenant, response_id), after)

    def wish_cancelled(self, tenant: str, response_id: str) -> None:
        with self._database.transaction() as connection:
            row = existing_row(connection, tenant, response_id)
            connection.execute("UPDATE responses SET cancel_wished = 1 WHERE number = ?", (row.number,))

    def unfinished(self) -> list[Unfinished]:
        query = f"SELECT tenant, id, owner_pid, owner_ticks, claim FROM responses WHERE {IS_OPEN} ORDER BY number"
        with self._database.transaction(write=False) as connection:
            rows = connection.execute(query).fetchall()
        return [Unfinished(tenant, one, ProcessId(pid, ticks), claim) for tenant, one, pid, ticks, claim in rows]

    def take(self, unfinished: Unfinished, owner: ProcessId, claim: str) -> Begun | None:
        with self._database.transaction() as connection:
            row = find_row(connection, unfinished.tenant, unfinished.response_id)
            if row is None or row.claim != unfinished.claim or row.status not in OPEN:
                return None
            connection.execute(
                "UPDATE responses SET owner_pid = ?, owner_ticks = ?, claim = ? WHERE number = ?",
                (owner.pid, owner.start_ticks, claim, row.number),
            )
            response = response_of(connection, row)
            asked = replace(response.asked, input=sqlite_items.all_of(connection, row.tenant, row.id))
            context = context_of(connection, row.tenant, row.context_id, row.conversation_id, row.context_end)
            return Begun(replace(response, asked=asked), row.session_id, claim, context)

    def delete(self, tenant: str, response_id: str) -> None:
        with self._database.transaction() as connection:
            row = existing_row(connection, tenant, response_id)
            if row.conversation_id is None:
                # What was said there is in the context of all that follows, and so in their sessions.
                for session_id in {row.session_id, *_sessions_after(connection, row)}:
                    doom_session(connection, tenant, session_id)
            connection.execute(
                "UPDATE responses SET context_id = ? WHERE tenant = ? AND context_id = ?",
                (row.context_id, tenant, row.id),
            )
            delete_row(connection, row)
        self._database.soil()

    def expire(self, before: float) -> bool:
        old = f"""
            WITH RECURSIVE kept (tenant, id) AS (
                SELECT tenant, id FROM responses WHERE created_at >= :before OR {IS_OPEN}
                UNION SELECT r.tenant, r.context_id FROM responses r JOIN kept k ON r.tenant = k.tenant AND r.id = k.id
                WHERE r.context_id IS NOT NULL
            )
            SELECT {COLUMNS} FROM responses
            WHERE created_at < :before AND (tenant, id) NOT IN (SELECT tenant, id FROM kept)
            ORDER BY number DESC LIMIT {self._expired_at_once}
        """
        unused = f"""
            SELECT tenant, id FROM conversations c WHERE used_at < :before AND NOT EXISTS (
                SELECT 1 FROM responses r WHERE r.tenant = c.tenant AND r.conversation_id = c.id AND {IS_OPEN})
            LIMIT {self._expired_at_once}
        """
        is_any = (
            "SELECT EXISTS (SELECT 1 FROM responses WHERE created_at < :before)"
            " OR EXISTS (SELECT 1 FROM conversations WHERE used_at < :before)"
        )
        when = {"before": before}
        with self._database.transaction(write=False) as connection:
            if not connection.execute(is_any, when).fetchone()[0]:
                return False
        with self._database.transaction() as connection:
            rows = [Row(*values) for values in connection.execute(old, when).fetchall()]
            conversations = connection.execute(unused, when).fetchall()
            for row in rows:
                delete_row(connection, row)
            for tenant, session_id in {(row.tenant, row.session_id) for row in rows if row.conversation_id is None}:
                if not _has_responses(connection, tenant, session_id):
                    doom_session(connection, tenant, session_id)
            for tenant, conversation_id in conversations:
                delete_conversation(connection, tenant, conversation_id)
        if rows or conversations:
            self._database.soil()
        return max(len(rows), len(conversations)) == self._expired_at_once

    def input_items(self, tenant: str, response_id: str, page: Page) -> ItemPage:
        with self._database.transaction(write=False) as connection:
            existing_row(connection, tenant, response_id)
            return sqlite_items.page_of(connection, tenant, response_id, page)

    def doomed_sessions(self) -> list[tuple[str, str]]:
        with self._database.transaction(write=False) as connection:
            return connection.execute("SELECT tenant, session_id FROM doomed_sessions").fetchall()

    def spare(self, tenant: str, session_id: str) -> None:
        with self._database.transaction() as connection:
            query = "DELETE FROM doomed_sessions WHERE tenant = ? AND session_id = ?"
            connection.execute(query, (tenant, session_id))

    def clean(self) -> None:
        self._database.clean()


def _exists(connection: sqlite3.Connection, tenant: str, conversation_id: str) -> bool:
    query = "SELECT EXISTS (SELECT 1 FROM conversations WHERE tenant = ? AND id = ?)"
    return bool(connection.execute(query, (tenant, conversation_id)).fetchone()[0])


def _has_responses(connection: sqlite3.Connection, tenant: str, session_id: str) -> bool:
    query = "SELECT EXISTS (SELECT 1 FROM responses WHERE tenant = ? AND session_id = ?)"
    return bool(connection.execute(query, (tenant, session_id)).fetchone()[0])


def _sessions_after(connection: sqlite3.Connection, row: Row) -> list[str]:
    """The sessions of all responses that go on from this one, directly or not."""
    query = """
        WITH RECURSIVE later (id, session_id) AS (
            SELECT id, session_id FROM responses WHERE tenant = :tenant AND context_id = :id
            UNION SELECT r.id, r.session_id FROM responses r JOIN later l ON r.context_id = l.id
            WHERE r.tenant = :tenant
        )
        SELECT DISTINCT session_id FROM later
    """
    return [one for (one,) in connection.execute(query, {"tenant": row.tenant, "id": row.id})]
