"""What a response's reply consists of, as items: a message, if anything was said, and calls of tools.

Owns: their shape, ids and order. A leaf. Knows nothing of HTTP, storage, and of how a reply is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from phi_cluster.cluster.told_logprobs import told_logprob
from phi_cluster.cluster.turn_api import CallPiece, ReplyPiece, TextPiece, call_id, piece_text

Item: TypeAlias = dict[str, Any]


def message_item(request_id: str, text: str, status: str, logprobs: Sequence[Item] = ()) -> Item:
    """What the assistant says; `logprobs` as `piece_logprobs` has them."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
    item = {"type": "message", "id": f"msg_{request_id}", "role": "assistant", "status": status}
    return {**item, "content": [part]}


def call_item(request_id: str, number: int, name: str, arguments: str, status: str) -> Item:
    """The `number`-th call."""
    item = {"type": "function_call", "id": f"fc_{request_id}{number:02x}", "call_id": call_id(request_id, number)}
    return {**item, "name": name, "arguments": arguments, "status": status}


def piece_logprobs(piece: ReplyPiece) -> list[Item]:
    """Of the piece's tokens, if they were asked for, as OpenAI's JSON."""
    return [told_logprob(one) for one in piece.logprobs] if isinstance(piece, TextPiece) else []


def output_items(
    request_id: str, pieces: Sequence[ReplyPiece], status: str, *, with_logprobs: bool = True
) -> list[Item]:
    """All of a reply. `status` is the last one's, the others are completed. Without any pieces: an empty message.
    `with_logprobs`: as far as they were asked for."""
    text = "".join(map(piece_text, pieces))
    logprobs = [one for piece in pieces for one in piece_logprobs(piece)] if with_logprobs else []
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                calls.append((piece.name, ""))
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    items = [message_item(request_id, text, "completed", logprobs)] if text or not calls else []
    items += [call_item(request_id, number, *call, "completed") for number, call in enumerate(calls)]
    items[-1]["status"] = status
    return items
