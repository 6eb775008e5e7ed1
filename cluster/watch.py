"""The cluster's state and events, asked of the controller.

Owns: the question, and that a controller which is being replaced is no error for longer than that takes. Implements
watch_api.Watch. Knows nothing of HTTP and of what the controller knows.
"""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayError

from phi_cluster.cluster.actors import find_controller
from phi_cluster.cluster.errors import Unavailable
from phi_cluster.cluster.watch_api import EventPage


class ClusterWatch:
    """For one process of the cluster."""

    async def cluster(self) -> dict[str, Any]:
        """See watch_api.Watch."""
        return await _ask("overview")

    async def events(self, after: int | None, limit: int, tenant: str | None, wait_seconds: float) -> EventPage:
        """See watch_api.Watch."""
        page: EventPage = await _ask("events", after, limit, tenant, wait_seconds)
        return page


async def _ask(method: str, *arguments: Any) -> Any:
    try:
        controller = find_controller()
        return await getattr(controller, method).remote(*arguments)
    except (ValueError, RayError):
        raise Unavailable("the controller is being restarted; try again", retry_after=2) from None
