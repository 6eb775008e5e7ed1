"""The engine's process: a Ray actor that maps the weights and serves one replica over a Unix socket.

Owns: the process. The only file of this room that knows Ray. Knows nothing of what the server does. It imports torch
only once it runs: replicas import this file too, to create the actor.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future
from typing import Any

import ray

from phi_cluster.cluster.engine.settings import EngineSettings
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.served_model import ServedModel
from phi_cluster.model.huge_pages import mapped_for_huge_pages

# Beside an engine that computes on all cores, a standby engine's imports (2.5 s of CPU) take a tenth of one.
_BACKGROUND_NICENESS = 10


@ray.remote
class EngineActor:
    """`start` returns once a step has been computed and the socket listens."""

    def __init__(self, served: ServedModel, settings: EngineSettings):
        log_as("engine")
        self._served = served
        self._settings = settings

    def warm_up(self, in_background: bool = False) -> None:
        """Imports what takes long, while others are still preparing, or `in_background`, at low priority."""
        # In a thread of its own: whoever has lowered its priority may not raise it again, and will compute later.
        importing = threading.Thread(target=_import, args=(in_background,), name="warm_up")
        importing.start()
        importing.join()

    def start(self, index: dict[str, Any], buffers: list[ray.ObjectRef]) -> ProcessId:
        """Raises RuntimeError if the self-test fails."""
        self._stored = ray.get(buffers[0])
        self._weights = mapped_for_huge_pages(self._stored)
        started: Future[None] = Future()
        # One thread builds and runs it all. A second one that computes would have OpenMP threads of its own, and with
        # more of them than cores OpenMP lets all of them sleep between two operations instead of waiting awake.
        threading.Thread(target=self._run, args=(index, started), name="engine", daemon=True).start()
        started.result()
        return process_id()

    def _run(self, index: dict[str, Any], started: Future[None]) -> None:
        from phi_cluster.cluster.engine.server import build_engine_server
        from phi_cluster.model.flat_weights import protect_read_only

        try:
            # Nobody writes there either.
            protect_read_only(self._stored)
            server = build_engine_server(self._served, self._settings, index, self._weights)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        server.run()

    def weights_address(self) -> int:
        """Where the middle of the weights lies in this process (to look at its protection)."""
        return self._weights.ctypes.data + self._weights.nbytes // 2

    def process(self) -> ProcessId:
        return process_id()


def _import(in_background: bool) -> None:
    if in_background:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
    import phi_cluster.cluster.engine.server  # noqa: F401
