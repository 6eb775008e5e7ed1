"""The prompt of a response: what was said before and what is asked now, as messages of a turn.

Owns: how items become messages. Knows nothing of sessions, templates and storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phi_cluster.cluster.response_api import Item


def messages_of(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """As `TurnRequest.messages`. Instructions stand before everything and are this response's own."""
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    return [*system, *map(_message, items)]


def _message(item: Item) -> dict[str, Any]:
    """Parts are joined by line ends, as in chats. OpenAI's developer is the system's new name."""
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": "\n".join(part["text"] for part in item["content"])}
