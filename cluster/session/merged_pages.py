"""One list of sessions made of what several nodes know: each session once, told by whoever holds it.

Owns: whose word counts where several know a session, and the page. Pure: knows nothing of Ray, of keepers and of how a
node finds out what it knows (catalog.py).

With journals that all share, every node knows every stored session, and one whose memory is elsewhere is `stored` to
all but its holder. Memory that has been left behind by a session that went on elsewhere may be on several nodes: the
last one used counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.catalog import Known, cursor_of, identity, place_of, totals_of
from phi_cluster.cluster.session_api import SessionQuery


@dataclass(frozen=True)
class MergedPage:
    """`rows` with the nodes that tell of them."""

    rows: list[tuple[str, SessionKey]]
    totals: dict[str, Any]
    has_more: bool
    last: str | None


def merged_page(query: SessionQuery, known: Iterable[tuple[str, Sequence[Known]]]) -> MergedPage:
    """`known`: what each node, by id, knows of the sessions that the query is about, whatever their state and node.
    Raises InvalidRequest if the cursor's session is not in the list any more (by `id` that does not matter)."""
    best: dict[tuple[str, str], tuple[str, Known]] = {}
    for node_id, rows in known:
        for row in rows:
            other = best.get(identity(row))
            if other is None or _rank(row) > _rank(other[1]):
                best[identity(row)] = node_id, row
    found = [(node_id, row) for node_id, row in best.values() if _is_asked(node_id, row, query)]
    # Python's sort is stable: equal ones stay in order of their ids, whichever way they go.
    found.sort(key=lambda one: identity(one[1]), reverse=query.is_descending and query.sort == "id")
    if query.sort != "id":
        found.sort(key=lambda one: one[1].measure, reverse=query.is_descending)
    begin = place_of([row for _, row in found], query)
    page = found[begin : begin + query.limit]
    return MergedPage(
        rows=[(node_id, row.key) for node_id, row in page],
        totals=totals_of([row for _, row in found]),
        has_more=begin + query.limit < len(found),
        last=cursor_of(page[-1][1], query) if page else None,
    )


def survey_query(query: SessionQuery) -> SessionQuery:
    """What each node is asked: what it knows is no more than a part of the truth about state and place."""
    return replace(query, state=None, node_id=None, after=None)


def _rank(row: Known) -> tuple[bool, float, bool]:
    return row.is_in_memory, row.last_used, row.state == "hibernated"


def _is_asked(node_id: str, row: Known, query: SessionQuery) -> bool:
    if query.state not in (None, row.state):
        return False
    return query.node_id is None or (row.is_in_memory and node_id.startswith(query.node_id))
