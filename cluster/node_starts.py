"""Nodes that have joined get their actors: one start at a time for each, and one that fails is told and tried again.

Owns: which nodes are being started. Knows nothing of what a start does (node_tasks.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import ray
from ray.exceptions import RayError, RayTaskError

from phi_cluster.cluster.cluster_news import ClusterNews
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.events import EventKind
from phi_cluster.cluster.node_tasks import start_node
from phi_cluster.cluster.served_model import ServedModel

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 10.0


class NodeStarts:
    """For the controller's event loop. `start` and `clock` (monotonic seconds) may be given for tests."""

    def __init__(
        self,
        served: ServedModel,
        config: Config,
        news: ClusterNews,
        start: Callable[[str, str, ServedModel, Config], Awaitable[list[str]]] = start_node,
        here: Callable[[], str] = lambda: ray.get_runtime_context().get_node_id(),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._served = served
        self._config = config
        self._news = news
        self._start = start
        self._here = here
        self._clock = clock
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._failed_at: dict[str, float] = {}

    def wanted(self, node_id: str) -> None:
        """The node has no keeper. This one's actors are whoever's who started the server."""
        if node_id == self._here() or node_id in self._under_way:
            return
        if self._clock() - self._failed_at.get(node_id, -_AGAIN_SECONDS) < _AGAIN_SECONDS:
            return
        self._under_way[node_id] = asyncio.get_running_loop().create_task(self._run(node_id))

    async def _run(self, node_id: str) -> None:
        try:
            notes = await self._start(node_id, self._here(), self._served, self._config)
            for note in notes:
                logger.warning("node %s: %s", node_id[:12], note)
            self._news.add(EventKind.NODE_JOINED, reason=node_id[:12])
            self._failed_at.pop(node_id, None)
        except (PhiError, RayError) as error:
            self._failed_at[node_id] = self._clock()
            cause = error.cause if isinstance(error, RayTaskError) else error
            told = cause.message if isinstance(cause, PhiError) else type(error).__name__
            logger.error("node %s was not started: %s", node_id[:12], told)
            self._news.add(EventKind.NODE_REFUSED, reason=f"{node_id[:12]}: {told}"[:200])
        finally:
            del self._under_way[node_id]
