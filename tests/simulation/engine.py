"""A simulated engine process, and a replica's link to it.

Owns: the engine's side of a segment as engine/segment_kv.py, engine/server.py and engine/engine.py have it (splice, the
writer's mark, row before token, released last), one token a step. Knows nothing of sessions, replicas or faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

from phi_cluster.cluster.engine_link import EngineLost
from phi_cluster.cluster.frames import (
    AbortSequence,
    AddSequence,
    ExtendSequence,
    Frame,
    SequenceOutput,
    StepFrame,
    TakeOver,
)
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.session.segment import SegmentGone, SegmentLayout, SegmentMismatch
from tests.simulation import language
from tests.simulation.loop import Loop, Process
from tests.simulation.network import Channel, Network
from tests.simulation.storage import FINGERPRINT, Segments, SimulatedSegment


class Sequence:
    """Raises SegmentGone, SegmentMismatch and ValueError."""

    def __init__(self, frame: AddSequence, segment: SimulatedSegment):
        self.frame = frame
        self.segment = segment
        self.max_num_tokens = frame.max_num_tokens
        stored = segment.token_ids()
        if not 0 <= frame.num_kept_tokens <= len(stored):
            raise ValueError(f"{frame.num_kept_tokens} tokens are to be kept, the segment holds {len(stored)}")
        kept = frame.num_kept_tokens
        for old, new in zip(stored[kept:], frame.token_ids, strict=False):
            if old != new:
                break
            kept += 1
        segment.trim(kept)
        segment.append_tokens(frame.token_ids[kept - frame.num_kept_tokens :])
        self.token_ids = stored[: frame.num_kept_tokens] + frame.token_ids
        if len(self.token_ids) > frame.max_num_tokens:
            raise ValueError("more tokens than max_num_tokens")
        computed = min(segment.num_computed_tokens, len(self.token_ids) - 1)
        segment.set_num_computed_tokens(computed)
        self.num_cached_tokens: int | None = min(computed, frame.num_prompt_tokens)

    def finish_reason(self) -> str | None:
        reply = self.token_ids[self.frame.num_prompt_tokens :]
        if reply and reply[-1] in self.frame.sampling["stop_token_ids"]:
            return "stop"
        return "length" if len(reply) >= self.frame.sampling["max_tokens"] else None


class Engine:
    """`added(sequence)` and `writes(sequence)` watch it."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        rng: Random,
        process: Process,
        segments: Segments,
        layout: SegmentLayout,
        added: Callable[[Sequence], None],
        writes: Callable[[Sequence], None],
    ):
        self._loop = loop
        self._rng = rng
        self._process = process
        self._segments = segments
        self._layout = layout
        self._added = added
        self._writes = writes
        self._sequences: dict[int, Sequence] = {}
        self._outputs: list[SequenceOutput] = []
        self._step = 0
        self._awake = False
        self.inbox = Channel(loop, network, process, self._handle)
        self.outbox: Channel | None = None

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, AddSequence):
            try:
                self._add(frame)
            except (OSError, ValueError) as error:
                reason = "gone" if isinstance(error, SegmentGone) else "error"
                self._outputs.append(SequenceOutput(frame.sequence_id, [], reason, released=True, error=str(error)))
        elif isinstance(frame, AbortSequence):
            if frame.sequence_id in self._sequences:
                self._finish(self._sequences[frame.sequence_id], "abort", [])
        elif isinstance(frame, ExtendSequence):
            sequence = self._sequences.get(frame.sequence_id)
            if sequence is not None:
                sequence.max_num_tokens = max(sequence.max_num_tokens, frame.max_num_tokens)
        elif isinstance(frame, TakeOver):
            self._send()
        self._wake()

    def _add(self, frame: AddSequence) -> None:
        segment = self._segments.open(frame.segment, self._layout, FINGERPRINT)
        try:
            self._claim(segment, frame.epoch)
            sequence = Sequence(frame, segment)
            self._added(sequence)
        except BaseException:
            self._leave(segment)
            raise
        self._sequences[frame.sequence_id] = sequence
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason, [])

    def _claim(self, segment: SimulatedSegment, epoch: int) -> None:
        if segment.epoch != epoch:
            raise SegmentMismatch("the segment has been lent to a later turn")
        segment.writer = self._process.identity

    def _leave(self, segment: SimulatedSegment) -> None:
        if segment.writer == self._process.identity:
            segment.writer = None
        segment.close()

    def _wake(self) -> None:
        if not self._awake and (self._outputs or any(map(_can_go_on, self._sequences.values()))):
            self._awake = True
            self._loop.call_later(self._rng.choice((0.005, 0.01, 0.03)), self._run_step)

    def _run_step(self) -> None:
        self._awake = False
        for sequence in list(self._sequences.values()):
            if _can_go_on(sequence):
                self._advance(sequence)
        self._send()
        self._wake()

    def _advance(self, sequence: Sequence) -> None:
        """One step: rows that are missing, how many there are, the token."""
        self._writes(sequence)
        segment, token_ids = sequence.segment, sequence.token_ids
        computed = segment.num_computed_tokens
        rows = segment.memory.rows
        last = rows[computed - 1] if computed else 0
        del rows[computed:]
        for token_id in token_ids[computed:]:
            last = language.row(last, token_id)
            rows.append(last)
        segment.set_num_computed_tokens(len(token_ids))
        token_id = language.draw(last, token_ids, sequence.frame.sampling["seed"])
        segment.append_tokens([token_id])
        token_ids.append(token_id)
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason, [token_id])
        else:
            self._put(sequence, [token_id], None)

    def _finish(self, sequence: Sequence, reason: str, token_ids: list[int]) -> None:
        del self._sequences[sequence.frame.sequence_id]
        self._leave(sequence.segment)
        self._put(sequence, token_ids, reason)

    def _put(self, sequence: Sequence, token_ids: list[int], reason: str | None) -> None:
        cached, sequence.num_cached_tokens = sequence.num_cached_tokens, None
        name = sequence.frame.sequence_id
        self._outputs.append(SequenceOutput(name, token_ids, reason, reason is not None, cached))

    def _send(self) -> None:
        self._step += 1
        outputs, self._outputs = self._outputs, []
        if self.outbox is not None:
            self.outbox.send(StepFrame(self._step, outputs, len(self._sequences), 0))


def _can_go_on(sequence: Sequence) -> bool:
    return len(sequence.token_ids) < sequence.max_num_tokens


class Link:
    """A replica's end (in the place of EngineLink). The engine dies some time after its replica, and `end`s at once."""

    def __init__(self, loop: Loop, network: Network, engine: Engine, process: Process, replica: Process, kill: Any):
        self._loop = loop
        self._inbox = engine.inbox
        self._process = process
        self._kill = kill
        self._on_step: Callable[[StepFrame], None] | None = None
        self._lost: asyncio.Future[str] = loop.create_future()
        self._served: asyncio.Future[None] = loop.create_future()
        self._outbox = engine.outbox = Channel(loop, network, replica, self._receive)
        process.at_death.append(lambda: self._outbox.send(None, late=0.006))
        self.engine = self

    @property
    def process(self) -> ProcessId:
        return self._process.identity

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def lost(self) -> str:
        return await asyncio.shield(self._lost)

    async def take_over(self, on_step: Callable[[StepFrame], None]) -> None:
        self._on_step = on_step
        self.send(TakeOver())
        either: set[asyncio.Future[Any]] = {self._served, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self.is_lost:
            raise EngineLost("lost before it served")

    def send(self, frame: Frame) -> None:
        if not self.is_lost:
            self._inbox.send(frame)

    async def end(self) -> None:
        self._receive(None)
        self._kill(self._process)
        await asyncio.sleep(0.002)

    def _receive(self, frame: StepFrame | None) -> None:
        if self.is_lost:
            return
        if frame is None:
            self._lost.set_result("death")
            return
        if self._on_step is not None:
            self._on_step(frame)
        if not self._served.done():
            self._served.set_result(None)
