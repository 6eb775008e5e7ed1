"""A sequence's way through engines as spans: it waits, its prompt is computed, its reply is.

Owns: these spans and what is told in them. They are made here, in the replica, of what the engine's frames say (how
long the sequence had waited, whom a step preempted) and of when they came: an engine that exported spans itself would
do so on the thread that computes, and its spans would die with it just when they are wanted. Knows nothing of sockets,
of text and of how spans are exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from phi_cluster.cluster.span import Attributes, Span, error_type

QUEUE, PREFILL, DECODE = "engine.queue", "engine.prefill", "engine.decode"


class SequenceTrace:
    """Begins with its construction, ends with its `with` block (implements
    sequence_stream.SequenceWatcher). `clock` is wall clock in seconds."""

    def __init__(self, parent: Span, attributes: Attributes, clock: Callable[[], float] = time.time):
        self._parent = parent
        self._attributes = attributes
        self._clock = clock
        self._began = clock()
        self._name = QUEUE
        self._phase = parent.begin(QUEUE, attributes, at=self._began)

    def on_scheduled(self, queue_seconds: float) -> None:
        """Its first step has been made in this engine, for which it had waited so long."""
        if self._name == QUEUE:
            self._next(PREFILL, min(self._began + queue_seconds, self._clock()))
        else:
            self._phase.event("engine.scheduled", {"phi.queue.seconds": queue_seconds})

    def on_tokens(self) -> None:
        if self._name != DECODE:
            self._next(DECODE, self._clock())

    def on_preempted(self) -> None:
        """Its memory was taken from it for others, in the engine."""
        self._phase.event("engine.preempted")

    def on_moved(self, *, died: bool) -> None:
        """Its engine is gone; `died`: not as it was told to. The next one goes on."""
        self._phase.event("engine.lost" if died else "engine.recycled")

    def __enter__(self) -> SequenceTrace:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """It is over, or nobody waits for it any more."""
        self._phase.end(None if error is None else error_type(error))

    def _next(self, name: str, at: float) -> None:
        self._phase.end(at=at)
        self._name = name
        self._phase = self._parent.begin(name, self._attributes, at=at)
