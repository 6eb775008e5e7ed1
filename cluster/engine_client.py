"""A replica's end of the step socket: adds sequences, hands out their tokens, and replaces an engine that died.

Owns: which engine serves this replica, the live sequences on it, and their failover: a sequence whose engine died is
added to the next one with the reply so far, and goes on where it stopped. Knows nothing of Ray (engines come from an
injected `spawn`), of how the loss of an engine is noticed (engine_link.py), of text, HTTP or sessions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from phi_cluster.cluster.engine_link import EngineHandle, EngineLink, EngineLost
from phi_cluster.cluster.errors import PhiError, Unavailable
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.frames import (
    NO_TOTALS,
    AbortSequence,
    AddSequence,
    EngineTotals,
    ExtendSequence,
    Frame,
    SequenceOutput,
    StepDown,
    StepFrame,
)
from phi_cluster.cluster.sequence_stream import SequenceStream
from phi_cluster.cluster.standby import StandbyEngines

logger = logging.getLogger(__name__)

_BACKOFF_SECONDS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)


class EngineObserver(Protocol):
    """Measures engines that serve. All times in seconds."""

    def on_step(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens, for so many sequences."""
        ...

    def on_scheduled(self, queue_seconds: float) -> None:
        """A sequence had waited for so long in the engine for its first step."""
        ...

    def on_recovered(self, seconds: float) -> None:
        """An engine that was lost is replaced, after so long."""
        ...


class Unobserved:
    """Nobody measures."""

    def on_step(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        pass

    def on_scheduled(self, queue_seconds: float) -> None:
        pass

    def on_recovered(self, seconds: float) -> None:
        pass


class EngineFailed(PhiError):
    """The engine gave a sequence up."""

    told = "the engine gave this request up; the server's log says why"


class EngineNotUp(Unavailable):
    """No engine was connected in time."""

    told = "no engine is up just now; try again"


class EngineClient:
    """Keeps one engine serving. All methods belong to one event loop.

    Attributes: `recoveries`, how many engines were lost while they served, by how; `recycles`, how many were renewed,
    by why; `serving_since` (monotonic seconds); `last_step`, the last step's frame; `totals`, what the engines that
    served have counted, all together.
    """

    def __init__(
        self,
        start_engine: Callable[[], Awaitable[EngineLink]],
        standbys: StandbyEngines,
        observer: EngineObserver | None = None,
        *,
        events: EventLog | None = None,
        ready_wait: float = 60.0,
        backoff: Sequence[float] = _BACKOFF_SECONDS,
    ):
        """`start_engine` brings up and connects a new engine, where `standbys` have none; they are closed with this.
        `observer` None: nobody measures. `events`: where the engines' lives are told. `ready_wait`: how long a request
        waits for an engine, also one whose engine died in the middle. `backoff`: before a start, by the number of
        starts that failed before it. All in seconds."""
        self._start_engine = start_engine
        self._standbys = standbys
        self._observer = observer or Unobserved()
        self._events = EventLog(time.time) if events is None else events
        self._ready_wait = ready_wait
        self._backoff = backoff
        self._streams: dict[int, SequenceStream] = {}
        self._next_sequence_id = 1
        # Until the death of its engine is proven.
        self._link: EngineLink | None = None
        self._connected = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        # Serves next, as soon as the one that serves has stepped down; and why.
        self._successor: EngineLink | None = None
        self._recycling: str | None = None
        self.recoveries: Counter[str] = Counter()
        self.recycles: Counter[str] = Counter()
        self.serving_since = time.monotonic()
        self.last_step = StepFrame(0, [], 0, 0)
        self.totals = NO_TOTALS
        self._engine_totals = NO_TOTALS
        self.last_error: str | None = None

    def start(self) -> None:
        """Starts the supervising task; `wait_ready` tells when an engine is connected."""
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Raises Unavailable if no engine is connected in time."""
        if self._connected.is_set():
            return
        try:
            await asyncio.wait_for(self._connected.wait(), self._ready_wait if timeout is None else timeout)
        except asyncio.TimeoutError:
            detail = f" ({self.last_error})" if self.last_error else ""
            raise EngineNotUp(f"the engine is not up{detail}; try again", retry_after=2) from None

    @property
    def ready(self) -> bool:
        return self._connected.is_set()

    @property
    def engine(self) -> EngineHandle | None:
        """The one that serves, or whose death is not proven yet."""
        return None if self._link is None else self._link.engine

    @property
    def replacements(self) -> int:
        return self.recoveries.total()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def next_sequence_id(self) -> int:
        self._next_sequence_id += 1
        return self._next_sequence_id

    async def add(self, add: AddSequence) -> SequenceStream:
        """Submits a sequence. Raises Unavailable if there is no engine in time."""
        await self.wait_ready()
        stream = SequenceStream(add)
        self._streams[add.sequence_id] = stream
        self._send(add)
        return stream

    def abort(self, stream: SequenceStream) -> None:
        """Asks for an end after the step in flight. `released` still comes through the stream."""
        if not stream.aborted and not stream.released:
            stream.aborted = True
            if self._link is None:
                # The engine's death is proven and no other has the sequence yet.
                self._finish(stream, "abort")
            else:
                self._send(AbortSequence(stream.add.sequence_id))

    def extend(self, stream: SequenceStream, max_num_tokens: int) -> None:
        """The sequence's lease covers so many tokens now."""
        stream.add = replace(stream.add, max_num_tokens=max_num_tokens)
        self._send(ExtendSequence(stream.add.sequence_id, max_num_tokens))

    async def recycle(self, reason: str) -> bool:
        """Renews the engine, make before break: sequences go on with the successor between two steps. False if one is
        being renewed, or none serves. Raises whatever goes wrong with the successor's start."""
        if self._recycling is not None or self._link is None:
            return False
        self._recycling = reason
        try:
            link = self._link
            successor = await self._standbys.make()
            if self._link is not link or link.is_lost:
                # It died meanwhile, and another one serves: as new as this one.
                await successor.end()
                return False
            self._successor = successor
        finally:
            if self._successor is None:
                self._recycling = None
        link.send(StepDown())
        return True

    async def close(self) -> None:
        """Ends all engines and every stream."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await asyncio.gather(self._standbys.close(), self._end_engine())
        if self._successor is not None:
            await self._successor.end()
        for stream in list(self._streams.values()):
            self._finish(stream, "error", "the replica is shutting down")

    def _send(self, frame: Frame) -> None:
        # Between engines there is nobody to write to: live streams are added again on connection.
        if self._link is not None:
            self._link.send(frame)

    async def _supervise(self) -> None:
        failures = 0
        patience: asyncio.TimerHandle | None = None
        lost_at: float | None = None
        was_planned = False
        while True:
            await asyncio.sleep(self._backoff[min(failures, len(self._backoff) - 1)])
            try:
                link = await self._next_engine()
            except Exception as error:
                failures += 1
                self.last_error = f"{type(error).__name__} at start"
                logger.warning("engine did not start: %s", error)
                continue
            failures = 0
            if patience is not None:
                patience.cancel()
            self._connect(link)
            if lost_at is None:
                self._events.add(EventKind.ENGINE_STARTED)
            else:
                pause = time.monotonic() - lost_at
                self._events.add(EventKind.ENGINE_TOOK_OVER, seconds=pause)
                logger.warning("engine %d took over after %.3f s", link.engine.process.pid, pause)
                if not was_planned:
                    self._observer.on_recovered(pause)
            how = await link.lost()
            lost_at = time.monotonic()
            self._connected.clear()
            await self._end_engine()
            was_planned = self._count_loss(how)
            patience = asyncio.get_running_loop().call_later(self._ready_wait, self._give_up)

    async def _next_engine(self) -> EngineLink:
        """One that has said that it serves: from those that stand by if one of them lives, else a new one."""
        while True:
            link, self._successor = self._successor or await self._standbys.take(), None
            is_standby = link is not None
            link = link or await self._start_engine()
            # Of this engine: its first frame is its answer.
            self._engine_totals = NO_TOTALS
            try:
                await link.take_over(self._take_step)
                return link
            except EngineLost as error:
                await link.end()
                if not is_standby:
                    raise
                logger.warning("%s", error)
            except BaseException:
                await link.end()
                raise

    def _connect(self, link: EngineLink) -> None:
        """All live sequences go on there."""
        self._link = link
        self.serving_since = time.monotonic()
        for stream in self._streams.values():
            link.send(stream.remaining())
        self._connected.set()
        self._standbys.fill()

    async def _end_engine(self) -> None:
        if self._link is not None:
            await self._link.end()
            self._link = None

    def _take_step(self, frame: StepFrame) -> None:
        """Hands a step's outputs out."""
        self.last_step = frame
        before, self._engine_totals = self._engine_totals, frame.totals
        self.totals = EngineTotals(*map(lambda all_, now, old: all_ + now - old, self.totals, frame.totals, before))
        if frame.work is not None:
            self._observer.on_step(*frame.work)
        for sequence_id in frame.preempted:
            if (stream := self._streams.get(sequence_id)) is not None:
                stream.preempted()
        for output in frame.outputs:
            if output.queue_seconds is not None:
                self._observer.on_scheduled(output.queue_seconds)
            stream = self._streams.get(output.sequence_id)
            if stream is None:
                continue
            stream.push(output)
            if stream.released:
                del self._streams[output.sequence_id]

    def _count_loss(self, how: str) -> bool:
        """Whether it was told to end, and did."""
        reason = None
        if self._successor is not None:
            reason, self._recycling = self._recycling, None
        # One that was told to step down ends; nothing else.
        died = reason is None or how != "death"
        if reason is not None and not died:
            self.recycles[reason] += 1
            self._events.add(EventKind.ENGINE_RECYCLED, reason=reason)
        else:
            self.recoveries[how] += 1
            self._events.add(EventKind.ENGINE_DIED, reason=how)
        self._settle(died=died)
        return reason is not None and not died

    def _settle(self, *, died: bool) -> None:
        """An engine that is gone released everything. What was over anyway, or kills engines, is not carried on."""
        for stream in list(self._streams.values()):
            stream.outlive_engine(died=died)
            if stream.finish_reason is not None:
                self._finish(stream, None)
            elif stream.aborted:
                self._finish(stream, "abort")
            elif stream.is_poisonous:
                self._finish(stream, "error", "engines died on it")

    def _give_up(self) -> None:
        """No engine came up in time for those whose engine died: they end, in time (promise C5)."""
        for stream in list(self._streams.values()):
            self._finish(stream, "error", f"its engine died and no other was up within {self._ready_wait:g} s")

    def _finish(self, stream: SequenceStream, reason: str | None, error: str | None = None) -> None:
        """Ends a sequence that no engine has (any more)."""
        sequence_id = stream.add.sequence_id
        stream.push(SequenceOutput(sequence_id, [], reason, released=True, error=error))
        self._streams.pop(sequence_id, None)
