"""Items in the SQLite file: the input of a response, or what a conversation consists of.

Owns: their order, and their pages. Knows nothing of responses and conversations but their ids, and of transactions but
that it is called in one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.response_api import Item, ItemPage, Page
from phi_cluster.cluster.responses.database import pack, unpack


def add(connection: sqlite3.Connection, tenant: str, holder: str, items: Sequence[Item]) -> None:
    """Behind those that are there; an item of the same id is replaced where it is."""
    connection.executemany(
        "INSERT INTO items (tenant, holder, id, body) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (tenant, holder, id) DO UPDATE SET body = excluded.body",
        [(tenant, holder, item["id"], pack(item)) for item in items],
    )


def all_of(connection: sqlite3.Connection, tenant: str, holder: str, up_to: int | None = None) -> list[Item]:
    """In order; `up_to`: those with at most this number (see `last_number`)."""
    rows = connection.execute(
        "SELECT body FROM items WHERE tenant = ? AND holder = ? AND number <= ? ORDER BY number",
        (tenant, holder, 2**62 if up_to is None else up_to),
    )
    return [unpack(body) for (body,) in rows]


def last_number(connection: sqlite3.Connection, tenant: str, holder: str) -> int:
    """Grows with each item; 0 without any."""
    query = "SELECT coalesce(max(number), 0) FROM items WHERE tenant = ? AND holder = ?"
    number: int = connection.execute(query, (tenant, holder)).fetchone()[0]
    return number


def one(connection: sqlite3.Connection, tenant: str, holder: str, item_id: str, param: str | None = None) -> Item:
    """Raises NotFound, naming `param`."""
    return _find(connection, tenant, holder, item_id, param)[1]


def find_anywhere(connection: sqlite3.Connection, tenant: str, item_id: str) -> Item | None:
    """The item, whatever holds it."""
    query = "SELECT body FROM items WHERE tenant = ? AND id = ? LIMIT 1"
    row = connection.execute(query, (tenant, item_id)).fetchone()
    item: Item | None = None if row is None else unpack(row[0])
    return item


def page_of(connection: sqlite3.Connection, tenant: str, holder: str, page: Page) -> ItemPage:
    """Raises NotFound if there is no item to go on behind."""
    beyond = 0 if page.ascending else 2**62
    if page.after is not None:
        beyond = _find(connection, tenant, holder, page.after, "after")[0]
    beside, order = (">", "ASC") if page.ascending else ("<", "DESC")
    rows = connection.execute(
        f"SELECT body FROM items WHERE tenant = ? AND holder = ? AND number {beside} ? ORDER BY number {order} LIMIT ?",
        (tenant, holder, beyond, page.limit + 1),
    ).fetchall()
    return ItemPage([unpack(body) for (body,) in rows[: page.limit]], has_more=len(rows) > page.limit)


def delete(connection: sqlite3.Connection, tenant: str, holder: str, item_id: str | None = None) -> None:
    """One, or all of a holder's. Raises NotFound."""
    if item_id is None:
        connection.execute("DELETE FROM items WHERE tenant = ? AND holder = ?", (tenant, holder))
    else:
        number, _ = _find(connection, tenant, holder, item_id, None)
        connection.execute("DELETE FROM items WHERE number = ?", (number,))


def _find(
    connection: sqlite3.Connection, tenant: str, holder: str, item_id: str, param: str | None
) -> tuple[int, Item]:
    query = "SELECT number, body FROM items WHERE tenant = ? AND holder = ? AND id = ?"
    row = connection.execute(query, (tenant, holder, item_id)).fetchone()
    if row is None:
        raise NotFound(f"There is no item {item_id[:100]!r} here", param=param)
    return row[0], unpack(row[1])
