"""Conversations in the SQLite file (implements store.ConversationStore).

Owns: their rows, and that the session of one that has lost an item is given up: it remembers the item. Knows nothing
of turns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.response_api import Conversation, Item, ItemPage, Page
from phi_cluster.cluster.responses import sqlite_items
from phi_cluster.cluster.responses.database import ResponseDatabase, pack, unpack


class SQLiteConversations:
    def __init__(self, database: ResponseDatabase):
        self._database = database

    def create(self, tenant: str, conversation: Conversation, items: Sequence[Item]) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO conversations (tenant, id, created_at, used_at, metadata) VALUES (?, ?, ?, ?, ?)",
                (
                    tenant,
                    conversation.id,
                    conversation.created_at,
                    conversation.created_at,
                    pack(conversation.metadata),
                ),
            )
            sqlite_items.add(connection, tenant, conversation.id, items)

    def find(self, tenant: str, conversation_id: str) -> Conversation:
        with self._database.transaction(write=False) as connection:
            return find_conversation(connection, tenant, conversation_id)

    def update(self, tenant: str, conversation_id: str, metadata: dict[str, str], now: float) -> Conversation:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE conversations SET metadata = ?, used_at = ? WHERE tenant = ? AND id = ?",
                (pack(metadata), now, tenant, conversation_id),
            )
            return find_conversation(connection, tenant, conversation_id)

    def delete(self, tenant: str, conversation_id: str) -> None:
        with self._database.transaction() as connection:
            find_conversation(connection, tenant, conversation_id)
            delete_conversation(connection, tenant, conversation_id)
        self._database.soil()

    def add_items(self, tenant: str, conversation_id: str, items: Sequence[Item], now: float) -> None:
        with self._database.transaction() as connection:
            find_conversation(connection, tenant, conversation_id)
            sqlite_items.add(connection, tenant, conversation_id, items)
            touch_conversation(connection, tenant, conversation_id, now)

    def items(self, tenant: str, conversation_id: str, page: Page) -> ItemPage:
        with self._database.transaction(write=False) as connection:
            find_conversation(connection, tenant, conversation_id)
            return sqlite_items.page_of(connection, tenant, conversation_id, page)

    def item(self, tenant: str, conversation_id: str, item_id: str) -> Item:
        with self._database.transaction(write=False) as connection:
            find_conversation(connection, tenant, conversation_id)
            return sqlite_items.one(connection, tenant, conversation_id, item_id)

    def delete_item(self, tenant: str, conversation_id: str, item_id: str) -> Conversation:
        with self._database.transaction() as connection:
            conversation = find_conversation(connection, tenant, conversation_id)
            sqlite_items.delete(connection, tenant, conversation_id, item_id)
            doom_session(connection, tenant, conversation_id)
        self._database.soil()
        return conversation


def find_conversation(connection: sqlite3.Connection, tenant: str, conversation_id: str) -> Conversation:
    """Raises NotFound."""
    query = "SELECT created_at, metadata FROM conversations WHERE tenant = ? AND id = ?"
    row = connection.execute(query, (tenant, conversation_id)).fetchone()
    if row is None:
        raise NotFound(f"There is no conversation {conversation_id[:100]!r}", param="conversation")
    return Conversation(conversation_id, row[0], unpack(row[1]))


def touch_conversation(connection: sqlite3.Connection, tenant: str, conversation_id: str, now: float) -> None:
    """It has been used."""
    query = "UPDATE conversations SET used_at = max(used_at, ?) WHERE tenant = ? AND id = ?"
    connection.execute(query, (now, tenant, conversation_id))


def delete_conversation(connection: sqlite3.Connection, tenant: str, conversation_id: str) -> None:
    """With its items and its session."""
    connection.execute("DELETE FROM conversations WHERE tenant = ? AND id = ?", (tenant, conversation_id))
    sqlite_items.delete(connection, tenant, conversation_id)
    doom_session(connection, tenant, conversation_id)


def doom_session(connection: sqlite3.Connection, tenant: str, session_id: str) -> None:
    """The session holds what was deleted: it is to go. Noted here, so that it goes also if we die before."""
    connection.execute("INSERT OR IGNORE INTO doomed_sessions VALUES (?, ?)", (tenant, session_id))
