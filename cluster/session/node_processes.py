"""Whether processes of other nodes live: their keepers are asked, now and then.

Owns: asking, and telling the accounts whose turns nobody will end any more. Knows nothing of what a turn is.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.session.accounts import Accounts

_LOOK_SECONDS = 5.0
_ANSWER_SECONDS = 5.0


class NodeProcesses:
    """For one event loop. `keeper_of` finds a node's keeper, and raises ValueError if there is none (any more)."""

    def __init__(self, accounts: Accounts, keeper_of: Callable[[str], Any]):
        self._accounts = accounts
        self._keeper_of = keeper_of
        self._looked_at = -math.inf

    async def look(self) -> None:
        """Does something every few seconds, where there are turns of other nodes."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        by_node: dict[str, list[ProcessId]] = {}
        for node_id, process in self._accounts.elsewhere():
            by_node.setdefault(node_id, []).append(process)
        for node_id, processes in by_node.items():
            try:
                call = self._keeper_of(node_id).are_alive.remote(processes)
                alive = await asyncio.wait_for(call, _ANSWER_SECONDS)
            except ValueError:
                # Its node is gone, and all that was on it.
                alive = [False] * len(processes)
            except (RayError, asyncio.TimeoutError):
                # It is being started again: the next look will tell.
                continue
            for process, lives in zip(processes, alive, strict=True):
                if not lives:
                    self._accounts.ended(node_id, process)
