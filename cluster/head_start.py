"""The head's part of a server that nobody stays for: where Serve has built the application by itself, what runs on the
head is started by a task, and again by the replicas after a head that was lost.

Owns: that task, and when replicas ask for it. Knows nothing of what is started (head.py), and of the application.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.runtime_dir import current_runtime_dir

_HEAD_RESOURCE = "node:__internal_head__"
# So long there may be no controller: it is being restarted by Ray, or by whoever started the server.
_MISSING_SECONDS = 20.0


def start_on_head(config: Config) -> Any:
    """A reference to what `prepare` has found out (preparation.Prepared), which is there when the head's part works.
    What works already is left as it is. Raises StartError, the reference RayTaskError."""
    for node in ray.nodes():
        if node["Alive"] and _HEAD_RESOURCE in node["Resources"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            return _start.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(config)
    raise StartError("this Ray has no head")


@ray.remote
def _start(config: Config) -> Any:
    log_as("head_start")
    # Replicas import this file, and need none of these.
    from phi_cluster.cluster.head import claim, start_head_again
    from phi_cluster.cluster.node_tasks import check_nodes
    from phi_cluster.cluster.preparation import prepare
    from phi_cluster.cluster.report import Report

    prepared = prepare(config, Report(), serves=True)
    check_nodes(config, prepared.weights_nbytes)
    claim(prepared)
    start_head_again(prepared, ray.get_runtime_context().get_node_id(), current_runtime_dir())
    return prepared


class HeadWatch:
    """A replica's: whether the head's part has been away for too long. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._missing_since: float | None = None

    def seen(self) -> None:
        self._missing_since = None

    def should_start(self) -> bool:
        """It is not there just now. After a yes the time begins anew."""
        now = self._clock()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < _MISSING_SECONDS:
            return False
        self._missing_since = now
        return True
