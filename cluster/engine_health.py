"""Whether a replica's engine gets on: what /health, /ready and Serve's own check are answered by.

Owns: how long an engine may be without a step. Knows nothing of HTTP, Serve, or how an engine is replaced.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from phi_cluster.cluster.engine_client import EngineClient

# Without a step for so long an engine is not ready, and then not alive: it steps every few seconds also when idle.
_SILENCE_SECONDS = 15.0
# A replica whose engine could not be brought up in so long is not worth keeping.
START_SECONDS = 300.0


class EngineHealth:
    """Implements turn_api.Health. `started` is set when it is ready for the first time, if nobody does so before.
    `clock` is monotonic, in seconds."""

    def __init__(self, engines: EngineClient, started: asyncio.Event, clock: Callable[[], float] = time.monotonic):
        self._engines = engines
        self.started = started
        self._clock = clock
        self._last_step = (0, clock())

    def live(self) -> bool:
        return self.silence() < START_SECONDS

    def ready(self) -> tuple[bool, str]:
        silence = self.silence()
        if not self._engines.ready or self._engines.last_step.step == 0:
            return False, "the engine is starting"
        if silence > _SILENCE_SECONDS:
            return False, f"the engine has made no step for {silence:.0f} s"
        self.started.set()
        return True, "ready"

    def silence(self) -> float:
        """For how many seconds the engine's step counter has not changed, as far as this was asked."""
        # Of another engine the same count is another step.
        step = self._engines.last_step.step + (self._engines.replacements << 40)
        if step != self._last_step[0]:
            self._last_step = (step, self._clock())
        return self._clock() - self._last_step[1]
