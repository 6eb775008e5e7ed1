"""Which results of tools belong to a call.

Owns: this rule. Knows nothing of fields, and of how calls are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def first_orphan(messages: Iterable[dict[str, Any]]) -> int | None:
    """The index of the first result that answers no call, of messages as in `TurnRequest.messages`. Results stand
    behind the assistant's message that has their calls, one for each; a call without a result is the client's
    business."""
    open_calls: set[str] = set()
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            open_calls = {call["id"] for call in message.get("tool_calls", ())}
        elif message["tool_call_id"] in open_calls:
            open_calls.remove(message["tool_call_id"])
        else:
            return index
    return None
