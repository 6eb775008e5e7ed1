"""A response as a row of the SQLite file.

Owns: the columns, how a response becomes a row and a row a response. Knows nothing of which response belongs where.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.response_api import OPEN, NewResponse, Response, ResponseFault, ResponseUsage
from phi_cluster.cluster.responses import sqlite_items
from phi_cluster.cluster.responses.database import pack, unpack
from phi_cluster.cluster.responses.store import Branch
from phi_cluster.cluster.turn_api import (
    CallPiece,
    ReplyPiece,
    TextPiece,
    TokenChoice,
    TokenLogprob,
    Tool,
    ToolUse,
    WantedFormat,
)

COLUMNS = (
    "number, tenant, id, created_at, session_id, context_id, conversation_id, context_end, status, ended_at,"
    " cancel_wished, owner_pid, owner_ticks, claim, asked, outcome"
)
IS_OPEN = "status IN ('queued', 'in_progress')"


@dataclass(frozen=True)
class Row:
    number: int
    tenant: str
    id: str
    created_at: float
    session_id: str
    context_id: str | None
    conversation_id: str | None
    context_end: int
    status: Any
    ended_at: float | None
    cancel_wished: int
    owner_pid: int
    owner_ticks: int
    claim: str
    asked: bytes
    outcome: bytes


@dataclass(frozen=True)
class Place:
    """Where a response belongs."""

    session_id: str
    context_id: str | None = None
    conversation_id: str | None = None
    context_end: int = 0
    branch: Branch | None = None


def find_row(connection: sqlite3.Connection, tenant: str, response_id: str) -> Row | None:
    query = f"SELECT {COLUMNS} FROM responses WHERE tenant = ? AND id = ?"
    values = connection.execute(query, (tenant, response_id)).fetchone()
    return None if values is None else Row(*values)


def existing_row(connection: sqlite3.Connection, tenant: str, response_id: str) -> Row:
    row = find_row(connection, tenant, response_id)
    if row is None:
        raise NotFound(f"There is no response {response_id[:100]!r}", param="response_id")
    return row


def insert_row(connection: sqlite3.Connection, response: Response, place: Place, owner: ProcessId, claim: str) -> None:
    """With its input."""
    new = response.asked
    values = (
        *(new.tenant, new.id, response.created_at, place.session_id, place.context_id, place.conversation_id),
        *(place.context_end, response.status, None, 0, owner.pid, owner.start_ticks, claim),
        *(pack(_asked(new)), outcome_of(response)),
    )
    marks = ", ".join("?" * len(values))
    connection.execute(f"INSERT INTO responses ({COLUMNS.removeprefix('number, ')}) VALUES ({marks})", values)
    sqlite_items.add(connection, new.tenant, new.id, new.input)


def delete_row(connection: sqlite3.Connection, row: Row) -> None:
    connection.execute("DELETE FROM responses WHERE number = ?", (row.number,))
    connection.execute("DELETE FROM progress WHERE response = ?", (row.number,))
    sqlite_items.delete(connection, row.tenant, row.id)


def response_of(connection: sqlite3.Connection, row: Row, after: int = 0) -> Response:
    outcome = unpack(row.outcome)
    pieces = _pieces_of(outcome["pieces"])
    if row.status in OPEN:
        query = "SELECT first, pieces FROM progress WHERE response = ? ORDER BY first"
        for first, packed in connection.execute(query, (row.number,)):
            # Saved again by whoever took it over, perhaps in other groups: the same pieces.
            pieces[first:] = _pieces_of(unpack(packed))
    usage, fault = outcome["usage"], outcome["fault"]
    return Response(
        asked=_asked_for(row),
        created_at=row.created_at,
        status=row.status,
        pieces=tuple(pieces[after:]),
        usage=None if usage is None else ResponseUsage(*usage),
        fault=None if fault is None else ResponseFault(*fault),
        ended_at=row.ended_at,
    )


def _asked(new: NewResponse) -> dict[str, Any]:
    """What of a NewResponse is in no column of its own."""
    wanted = new.wanted_format
    return {
        "request_id": new.request_id,
        "settings": json.dumps(new.settings),
        "sampling": new.sampling,
        "stop": new.stop,
        # As JSON: a schema's numbers may be of any size.
        "wanted_format": wanted and (wanted.param, wanted.kind, json.dumps(wanted.value)),
        "tool_use": new.tool_use and json.dumps(asdict(new.tool_use)),
        "truncate": new.truncate,
        "background": new.background,
        "previous_response_id": new.previous_response_id,
    }


def _asked_for(row: Row) -> NewResponse:
    asked = unpack(row.asked)
    asked["settings"] = json.loads(asked["settings"])
    asked["stop"] = tuple(asked["stop"])
    if (wanted := asked.get("wanted_format")) is not None:
        asked["wanted_format"] = WantedFormat(wanted[0], wanted[1], json.loads(wanted[2]))
    if (packed := asked.get("tool_use")) is not None:
        tool_use = json.loads(packed)
        tools = tuple(Tool(**tool) for tool in tool_use.pop("tools"))
        asked["tool_use"] = ToolUse(tools, tuple(tool_use.pop("callable")), **tool_use)
    return NewResponse(tenant=row.tenant, input=[], conversation_id=row.conversation_id, **asked)


def _pieces_of(unpacked: list[Any]) -> list[ReplyPiece]:
    """What was a tuple is a list by now: a call's piece begins with a number, one with log probabilities with text."""

    def piece_of(packed: Any) -> ReplyPiece:
        if isinstance(packed, str):
            return packed
        if isinstance(packed[0], str):
            return TextPiece(packed[0], tuple(_logprob_of(*one) for one in packed[1]))
        return CallPiece(*packed)

    return list(map(piece_of, unpacked))


def _logprob_of(token: bytes, logprob: float | None, top: list[Any]) -> TokenLogprob:
    return TokenLogprob(token, logprob, tuple(TokenChoice(*one) for one in top))


def outcome_of(response: Response) -> bytes:
    """What becomes known of a response, packed."""
    usage, fault = response.usage, response.fault
    return pack(
        {
            "pieces": response.pieces,
            "usage": usage and (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_completion_tokens),
            "fault": fault and (fault.kind, fault.message),
        }
    )
