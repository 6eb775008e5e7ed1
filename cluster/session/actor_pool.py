"""A node's session actors that have no session: spawned ahead, one at a time, at the lowest priority, and used again.

Owns: spawning, the warm ones, and what becomes of those that are done: a process ends with its session, but the actor
that ran in it is restarted in a new one and becomes warm again, because Ray keeps a record of each actor there ever was
in each process that called it. Knows nothing of sessions: it hands out empty actors.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from phi_cluster.cluster.actors import NAMESPACE, SESSION_PREFIX, create, detached_options
from phi_cluster.cluster.messages import Moved, ProcessId
from phi_cluster.cluster.processes import is_alive, kill_for_sure
from phi_cluster.cluster.session.actor import SessionActor
from phi_cluster.cluster.session.journals import JournalPlace
from phi_cluster.cluster.session.segment import SegmentLayout
from phi_cluster.cluster.session.signal_timer import find_library, rare_signal_checks

logger = logging.getLogger(__name__)

# Spawning costs a CPU-second: at this niceness it takes what engines leave.
_PRIORITY = f"nice -n 19 {sys.executable}"
# One that is silent for so long hangs.
ANSWER_SECONDS = 10.0
# A restarted actor is up by then, on a busy machine too.
_RESTART_SECONDS = 60.0
# Between two looks whether it is.
_LOOK_SECONDS = 0.1
# So many more than are to be kept warm may wait for a session: what comes and goes is the same few actors.
_SPARES = 4


@dataclass(frozen=True)
class PooledActor:
    """A SessionActor and the process it runs in, which is what tells it from those that the same actor ran in before
    and will after."""

    handle: Any
    process: ProcessId
    is_alive: Callable[[ProcessId], bool] = field(repr=False)

    async def call(self, method: str, *arguments: Any) -> Any:
        """What it answers. Raises RayError, also if its actor has another process by now, which has no session."""
        answer = await getattr(self.handle, method).remote(*arguments)
        if isinstance(answer, Moved) and not self.is_alive(self.process):
            raise RayActorError(error_msg="a session actor died, and was restarted without its session")
        return answer


class RayActors:
    """A node's session actors as Ray knows them."""

    def __init__(self, layout: SegmentLayout, fingerprint: str, place: JournalPlace, node_id: str):
        self._arguments = (layout, fingerprint, place)
        self._node_id = node_id
        self._prefix = f"{SESSION_PREFIX}{node_id}-"

    def create(self) -> Any:
        options = detached_options(f"{self._prefix}{uuid.uuid4().hex}", self._node_id)
        options["runtime_env"] = {
            "py_executable": _PRIORITY,
            "env_vars": rare_signal_checks(os.environ, find_library()),
        }
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
        """For good."""
        ray.kill(handle)

    async def restart(self, handle: Any, process: ProcessId) -> ProcessId:
        """Ends the process, and returns the actor's next one when it is up. Raises RayError."""
        # Of one that is dead Ray has restarted the actor by itself.
        if is_alive(process):
            ray.kill(handle, no_restart=False)
        while True:
            try:
                # Waits for a process if there is none: asking twice does no harm.
                found = await handle.process.options(max_task_retries=-1).remote()
            except ActorUnavailableError:
                found = process
            if found != process:
                return found
            await asyncio.sleep(_LOOK_SECONDS)

    async def kill_for_sure(self, process: ProcessId) -> None:
        """Also one that hangs, and returns when it is dead."""
        await kill_for_sure(process)


class ActorPool:
    """For one event loop. `num_kept`: how many are to be warm when nothing happens. `is_alive`: of their processes."""

    def __init__(self, actors: RayActors, num_kept: int, is_alive: Callable[[ProcessId], bool]):
        self.actors = actors
        self._is_alive = is_alive
        self._num_kept = num_kept
        self._warm: list[PooledActor] = []
        # Being restarted.
        self._returning: set[asyncio.Task[None]] = set()
        # Whoever wants an actor stands here, first come, first served.
        self._line = asyncio.Lock()

    @property
    def num_warm(self) -> int:
        """Those that are up."""
        return len(self._warm)

    @property
    def num_waiting(self) -> int:
        """With those that will be."""
        return len(self._warm) + len(self._returning)

    def pooled(self, handle: Any, process: ProcessId) -> PooledActor:
        return PooledActor(handle, process, self._is_alive)

    async def spawn(self) -> PooledActor:
        """Starts one and waits until it is up (about a second). Raises RayError."""
        handle = self.actors.create()
        try:
            return self.pooled(handle, await handle.process.remote())
        except BaseException:
            self.actors.kill(handle)
            raise

    def add(self, actor: PooledActor) -> None:
        self._warm.append(actor)

    async def take(self) -> PooledActor:
        """A warm one if there is one that lives, else one that is being restarted, else a new one; for all who ask, in
        the order of their coming. Raises RayError."""
        async with self._line:
            while True:
                while self._warm:
                    actor = self._warm.pop()
                    try:
                        process = await asyncio.wait_for(actor.handle.process.remote(), ANSWER_SECONDS)
                    except (RayError, asyncio.TimeoutError):
                        self.actors.kill(actor.handle)
                        continue
                    # It may have died and been restarted meanwhile.
                    return self.pooled(actor.handle, process)
                if not self._returning:
                    return await self.spawn()
                await asyncio.wait(self._returning, return_when=asyncio.FIRST_COMPLETED)

    def end(self, actor: PooledActor) -> None:
        """Its process ends, if it has not yet; the actor is kept for another session unless enough are."""
        if self.num_waiting >= self._num_kept + _SPARES:
            self.actors.kill(actor.handle)
            return
        returning = asyncio.get_running_loop().create_task(self._restart(actor))
        self._returning.add(returning)
        returning.add_done_callback(self._returning.discard)

    def leave(self) -> list[tuple[Any, ProcessId]]:
        """Those that are warm, for another pool; those that are being restarted end."""
        for returning in self._returning:
            returning.cancel()
        warm = [(actor.handle, actor.process) for actor in self._warm]
        self._warm.clear()
        return warm

    def end_all(self) -> None:
        for returning in self._returning:
            returning.cancel()
        while self._warm:
            self.actors.kill(self._warm.pop().handle)

    async def _restart(self, actor: PooledActor) -> None:
        try:
            restart = self.actors.restart(actor.handle, actor.process)
            process = await asyncio.wait_for(restart, _RESTART_SECONDS)
        except BaseException as error:
            self.actors.kill(actor.handle)
            if not isinstance(error, (RayError, asyncio.TimeoutError)):
                raise
            logger.warning("a session actor was not restarted: %s", type(error).__name__)
        else:
            self._warm.append(self.pooled(actor.handle, process))
