"""A chat's calls as OpenAI's JSON.

Owns: their shapes, streamed and whole. Knows nothing of how calls are read from a reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from phi_cluster.cluster.turn_api import CallPiece


def call_delta(piece: CallPiece, call_id: str) -> dict[str, Any]:
    """An entry of a delta's `tool_calls`."""
    if piece.name is None:
        return {"index": piece.number, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.number, "id": call_id, "type": "function", "function": function}


def whole_calls(pieces: Sequence[CallPiece], id_of: Callable[[CallPiece], str]) -> list[dict[str, Any]]:
    """A message's `tool_calls`, of their pieces in order; who reads on within a call gets the rest of its arguments,
    and no name."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        new = {"id": id_of(piece), "type": "function", "function": {"name": piece.name or "", "arguments": ""}}
        calls.setdefault(piece.number, new)["function"]["arguments"] += piece.arguments
    return list(calls.values())
