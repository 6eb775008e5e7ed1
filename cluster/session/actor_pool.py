"""A node's session actors that have no session yet: spawned ahead, one at a time, at the lowest priority.

Owns: spawning, the warm ones, and ending those that are done. Knows nothing of sessions: it hands out empty actors.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from phi_cluster.cluster.actors import NAMESPACE, SESSION_PREFIX, create, detached_options
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import kill_for_sure
from phi_cluster.cluster.session.actor import SessionActor
from phi_cluster.cluster.session.journals import JournalPlace
from phi_cluster.cluster.session.segment import SegmentLayout

# Spawning costs a CPU-second: at this niceness it takes what engines leave.
_PRIORITY = f"nice -n 19 {sys.executable}"
# One that is silent for so long hangs.
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class PooledActor:
    """A SessionActor and the process it runs in."""

    handle: Any
    process: ProcessId


class RayActors:
    """A node's session actors as Ray knows them."""

    def __init__(self, layout: SegmentLayout, fingerprint: str, place: JournalPlace, node_id: str):
        self._arguments = (layout, fingerprint, place)
        self._node_id = node_id
        self._prefix = f"{SESSION_PREFIX}{node_id}-"

    def create(self) -> Any:
        options = detached_options(f"{self._prefix}{uuid.uuid4().hex}", self._node_id, restarts=0)
        options["runtime_env"] = {"py_executable": _PRIORITY}
        return create(SessionActor, options, *self._arguments)

    def names(self) -> list[str]:
        """Of all that there are, also those that an earlier keeper had."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        ours = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
        return [name for name in ours if name.startswith(self._prefix)]

    def find(self, name: str) -> Any:
        """Raises ValueError if there is none (any more)."""
        return ray.get_actor(name, namespace=NAMESPACE)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    async def kill_for_sure(self, process: ProcessId) -> None:
        """Also one that hangs, and returns when it is dead."""
        await kill_for_sure(process)


class ActorPool:
    """For one event loop."""

    def __init__(self, actors: RayActors):
        self.actors = actors
        self._warm: list[PooledActor] = []

    @property
    def num_warm(self) -> int:
        return len(self._warm)

    async def spawn(self) -> PooledActor:
        """Starts one and waits until it is up (about a second). Raises RayError."""
        handle = self.actors.create()
        try:
            return PooledActor(handle, await handle.process.remote())
        except BaseException:
            self.actors.kill(handle)
            raise

    def add(self, actor: PooledActor) -> None:
        self._warm.append(actor)

    async def take(self) -> PooledActor:
        """A warm one if there is one that lives, else a new one."""
        while self._warm:
            actor = self._warm.pop()
            try:
                await asyncio.wait_for(actor.handle.process.remote(), ANSWER_SECONDS)
                return actor
            except (RayError, asyncio.TimeoutError):
                self.end(actor)
        return await self.spawn()

    def end(self, actor: PooledActor) -> None:
        self.actors.kill(actor.handle)

    def end_all(self) -> None:
        while self._warm:
            self.end(self._warm.pop())
