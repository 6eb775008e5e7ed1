"""A chat's calls as OpenAI's JSON.

Owns: their shapes, streamed and whole. Knows nothing of how calls are read from a reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from phi_cluster.cluster.turn_api import CallPiece


def call_deltas(pieces: Sequence[CallPiece], id_of: Callable[[CallPiece], str]) -> list[dict[str, Any]]:
    """A delta's `tool_calls`, one for each call that these pieces are of."""
    deltas: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        delta = deltas.setdefault(piece.number, {"index": piece.number, "function": {"arguments": ""}})
        if piece.name is not None:
            delta |= {"id": id_of(piece), "type": "function", "function": {"name": piece.name, "arguments": ""}}
        delta["function"]["arguments"] += piece.arguments
    return list(deltas.values())


def whole_calls(pieces: Sequence[CallPiece], id_of: Callable[[CallPiece], str]) -> list[dict[str, Any]]:
    """A message's `tool_calls`, of their pieces in order; who reads on within a call gets the rest of its arguments,
    and no name."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        new = {"id": id_of(piece), "type": "function", "function": {"name": piece.name or "", "arguments": ""}}
        calls.setdefault(piece.number, new)["function"]["arguments"] += piece.arguments
    return list(calls.values())
