"""What the HTTP edge asks for those who watch over a cluster: its parts and its events.

Owns: these shapes and protocols. A leaf: the edge calls them, `watch` and the controller implement them,
tests fake them. Knows nothing of HTTP, Ray, or of where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class EventPage:
    """Events as JSON-able dicts, oldest first, each with a rising `number`. `last`: ask for those behind it next.
    `is_ending`: no more will come, the server stops."""

    events: list[dict[str, Any]]
    last: int
    has_more: bool = False
    is_ending: bool = False


class Watch(Protocol):
    """Knows the state of the whole cluster. Raises `Unavailable`."""

    async def cluster(self) -> dict[str, Any]:
        """Nodes, replicas and engines, memory, and the last minutes' speeds: JSON-able, see http/cluster.py."""
        ...

    async def events(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float) -> EventPage:
        """At most `limit` events behind the one numbered `after` (None: the last ones). Sessions are named to their own
        tenant; to everybody if `tenant` is None. If there is none, waits for so long."""
        ...
