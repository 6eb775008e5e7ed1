"""Engine processes through Ray: started beside the replica that asks, and ended for sure.

Owns: the options of an engine's actor, its settings, and its end. Knows nothing of which engine serves, of sequences or
of torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

import ray

from phi_cluster.cluster.actors import NAMESPACE, create, weight_store_name
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.engine.actor import EngineActor
from phi_cluster.cluster.engine.settings import EngineSettings, Speculation
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import kill_for_sure
from phi_cluster.cluster.served_model import ServedModel

# A start that takes longer hangs: also a large model is only mapped.
_START_SECONDS = 300.0


class RayEngine:
    """An engine process started through Ray (implements engine_link.EngineHandle)."""

    def __init__(self, actor: Any, process: ProcessId, socket_path: str):
        self._actor = actor
        self.process = process
        self.socket_path = socket_path

    async def end(self) -> None:
        """Kills the process and returns once it is dead for sure: only then may its segments be lent again."""
        await kill_for_sure(self.process)
        # Ray is told as well, but streams that wait to go on do not wait for its answer.
        asyncio.get_running_loop().run_in_executor(None, _forget, self._actor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket_path)


class EngineSpawner:
    """Starts engines in the caller's placement group: they live and die with it."""

    def __init__(self, served: ServedModel, config: Config, runtime_dir: Path, num_threads: int, node_id: str):
        self._served = served
        self._config = config
        self._runtime_dir = runtime_dir
        self._num_threads = num_threads
        self._node_id = node_id

    async def spawn(self) -> RayEngine:
        """One that is waited for: in the room that the placement group has for it."""
        # Ray sets OMP_NUM_THREADS from num_cpus. Without an environment of its own the actor gets a process that is up.
        return await self._spawn(self._num_threads, in_background=False)

    async def spawn_standby(self) -> RayEngine:
        """One that nobody waits for: what takes long is done at low priority. It takes no room, since it computes only
        once another one has ended."""
        return await self._spawn(0, in_background=True)

    async def _spawn(self, num_cpus: int, *, in_background: bool) -> RayEngine:
        config = self._config.engine
        settings = EngineSettings(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_threads=self._num_threads,
            device=self._config.device,
            socket_path=str(self._runtime_dir / f"engine-{uuid.uuid4().hex[:8]}.sock"),
            speculation=Speculation(**config.speculation.model_dump()),
        )
        options = {"num_cpus": num_cpus, "num_gpus": 1 if self._config.device == "cuda" else 0}
        actor = create(EngineActor, options, self._served, settings)
        try:
            actor.warm_up.remote(in_background)
            store = ray.get_actor(weight_store_name(self._node_id), namespace=NAMESPACE)
            index, buffers = await store.weights.remote()
            process = await asyncio.wait_for(actor.start.remote(index, buffers), _START_SECONDS)
        except BaseException:
            ray.kill(actor)
            raise
        return RayEngine(actor, process, settings.socket_path)


def _forget(actor: Any) -> None:
    with contextlib.suppress(Exception):
        ray.kill(actor)
