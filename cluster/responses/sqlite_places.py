"""Where a new response belongs: the session that it goes on with, or a new one, and what was said before it.

Owns: the rule that a session goes on from its last response only, and what references to items mean. Knows nothing of
what the sessions hold.
"""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import replace

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.response_api import OPEN, Item, NewResponse
from phi_cluster.cluster.responses import sqlite_items
from phi_cluster.cluster.responses.sqlite_conversations import find_conversation
from phi_cluster.cluster.responses.sqlite_rows import IS_OPEN, Place, Row, find_row, response_of
from phi_cluster.cluster.responses.store import Branch, StillRunning


def place_of(connection: sqlite3.Connection, new: NewResponse) -> Place:
    """Raises NotFound and StillRunning."""
    tenant = new.tenant
    if new.conversation_id is not None:
        find_conversation(connection, tenant, new.conversation_id)
        query = f"SELECT EXISTS (SELECT 1 FROM responses WHERE tenant = ? AND conversation_id = ? AND {IS_OPEN})"
        if connection.execute(query, (tenant, new.conversation_id)).fetchone()[0]:
            raise StillRunning("another response of this conversation is running; try again when it has ended")
        end = sqlite_items.last_number(connection, tenant, new.conversation_id)
        return Place(new.conversation_id, conversation_id=new.conversation_id, context_end=end)
    if new.previous_response_id is None:
        return Place(new.id)
    previous = find_row(connection, tenant, new.previous_response_id)
    if previous is None:
        raise NotFound(
            f"There is no response {new.previous_response_id[:100]!r} to go on from",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if previous.status in OPEN:
        raise StillRunning("the previous response is running; try again when it has ended, or cancel it")
    later = "SELECT 1 FROM responses WHERE tenant = ? AND session_id = ? AND number > ? AND status <> 'failed'"
    where = (tenant, previous.session_id, previous.number)
    has_gone_on = connection.execute(f"SELECT EXISTS ({later})", where).fetchone()[0]
    if previous.conversation_id is None and not has_gone_on:
        return Place(previous.session_id, context_id=previous.id)
    # The session has gone on otherwise, or is a conversation's: this one gets a session of its own.
    return Place(new.id, context_id=previous.id, branch=Branch(previous.session_id, _num_turns(connection, previous)))


def _num_turns(connection: sqlite3.Connection, last: Row) -> int:
    """Of how many turns the session consists up to this response, those included with which it began as a branch. One
    that failed counts only as the last: what it left is gone once another has gone on. (Where a branch had to be
    computed anew it has fewer; then there is nothing to copy for a branch of it.)"""
    num_turns = 0
    row: Row | None = last
    while row is not None:
        if row.conversation_id is not None:
            count = (
                "SELECT count(*) FROM responses WHERE tenant = ? AND session_id = ? AND number <= ?"
                " AND (status <> 'failed' OR id = ?)"
            )
            where = (row.tenant, row.session_id, row.number, last.id)
            return num_turns + int(connection.execute(count, where).fetchone()[0])
        num_turns += row.status != "failed" or row is last
        row = None if row.context_id is None else find_row(connection, row.tenant, row.context_id)
    return num_turns


def resolved(connection: sqlite3.Connection, new: NewResponse) -> NewResponse:
    """With the items themselves for references. Raises NotFound."""
    return replace(new, input=[_resolved(connection, new.tenant, index, one) for index, one in enumerate(new.input)])


def _resolved(connection: sqlite3.Connection, tenant: str, index: int, item: Item) -> Item:
    if item["type"] != "item_reference":
        return item
    item_id: str = item["id"]
    found = sqlite_items.find_anywhere(connection, tenant, item_id)
    # What a response said is in no list of items, but it is named like it.
    row = find_row(connection, tenant, f"resp_{item_id.removeprefix('msg_')}") if found is None else None
    if row is not None and (output := response_of(connection, row).output(with_logprobs=False)):
        found = output[0]
    if found is None:
        raise NotFound(f"There is no item {item_id!r}", param=f"input[{index}].id")
    return {**found, "id": f"msg_{uuid.uuid4().hex}"}


def context_of(
    connection: sqlite3.Connection, tenant: str, context_id: str | None, conversation_id: str | None, end: int
) -> list[Item]:
    """What was said before, oldest first."""
    if conversation_id is not None:
        return sqlite_items.all_of(connection, tenant, conversation_id, up_to=end)
    parts: list[list[Item]] = []
    while context_id is not None and (row := find_row(connection, tenant, context_id)) is not None:
        response = response_of(connection, row)
        parts.append([*sqlite_items.all_of(connection, tenant, row.id), *response.output(with_logprobs=False)])
        if row.conversation_id is not None:
            parts.append(sqlite_items.all_of(connection, tenant, row.conversation_id, up_to=row.context_end))
        context_id = row.context_id
    return [item for part in reversed(parts) for item in part]
