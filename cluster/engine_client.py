"""A replica's end of the step socket: adds sequences, hands out their tokens, and replaces an engine that died.

Owns: the connection to the one engine of this replica, the live sequences on it, and their failover: a sequence
whose engine died is added to the next one with the reply so far, and goes on where it stopped. Knows nothing of
Ray (engines come from an injected `spawn`), text, HTTP or sessions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from phi_cluster.cluster.errors import PhiError, Unavailable
from phi_cluster.cluster.messages import (
    AbortSequence,
    AddSequence,
    ExtendSequence,
    ProcessId,
    SequenceOutput,
    StepFrame,
    decode_frame,
    encode_frame,
)

logger = logging.getLogger(__name__)

# A request that was running on so many engines when they died is failed, not tried on a third (promise C8).
MAX_ENGINE_DEATHS = 2
_BACKOFF_SECONDS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)


class EngineHandle(Protocol):
    """A started engine process."""

    process: ProcessId
    socket_path: str

    async def end(self) -> None:
        """Kills it if need be, and returns when its death is proven."""


class EngineFailed(PhiError):
    """The engine gave a sequence up."""


class SequenceStream:
    """One sequence's outputs, across engines. Iterating ends after `released`."""

    def __init__(self, add: AddSequence):
        self.add = add
        self.received: list[int] = []
        self.finish_reason: str | None = None
        self.released = False
        self.aborted = False
        self.engine_deaths = 0
        self._outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()

    def push(self, output: SequenceOutput) -> None:
        self.received += output.token_ids
        self.finish_reason = self.finish_reason or output.finish_reason
        self.released = self.released or output.released
        self._outputs.put_nowait(output)

    def remaining(self) -> AddSequence:
        """What another engine needs to go on: the reply so far is part of the ids."""
        return replace(self.add, token_ids=self.add.token_ids + self.received)

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        while True:
            output = await self._outputs.get()
            yield output
            if output.released:
                return


class EngineClient:
    """Keeps one engine running and connected. All methods belong to one event loop."""

    def __init__(
        self,
        spawn: Callable[[], Awaitable[EngineHandle]],
        *,
        ready_wait: float = 60.0,
        step_wait: float = 60.0,
        backoff: Sequence[float] = _BACKOFF_SECONDS,
    ):
        """`ready_wait`: how long a request waits for an engine, also one whose engine died in the middle. `step_wait`:
        an engine silent for so long is taken for hung (longer than the longest step). `backoff`: before a start, by
        the number of starts that failed before it. All in seconds."""
        self._spawn = spawn
        self._ready_wait = ready_wait
        self._step_wait = step_wait
        self._backoff = backoff
        self._streams: dict[int, SequenceStream] = {}
        self._next_sequence_id = 1
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self.engine: EngineHandle | None = None
        self.replacements = 0
        self.last_step = StepFrame(0, [], 0, 0)
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
            raise Unavailable(f"the engine is not up{detail}; try again", retry_after=2) from None

    @property
    def ready(self) -> bool:
        return self._connected.is_set()

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
        self._send(encode_frame(add))
        return stream

    def abort(self, stream: SequenceStream) -> None:
        """Asks for an end after the step in flight. `released` still comes through the stream."""
        if not stream.aborted and not stream.released:
            stream.aborted = True
            if self.engine is None:
                # The engine's death is proven and its successor is not up: nobody has the sequence.
                self._finish(stream, "abort")
            else:
                self._send(encode_frame(AbortSequence(stream.add.sequence_id)))

    def extend(self, stream: SequenceStream, max_num_tokens: int) -> None:
        """The sequence's lease covers so many tokens now."""
        stream.add = replace(stream.add, max_num_tokens=max_num_tokens)
        self._send(encode_frame(ExtendSequence(stream.add.sequence_id, max_num_tokens)))

    async def close(self) -> None:
        """Ends the engine and every stream."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        await self._end_engine()
        for stream in list(self._streams.values()):
            self._finish(stream, "error", "the replica is shutting down")

    def _send(self, frame: bytes) -> None:
        # Between engines there is nobody to write to: live streams are added again on connection.
        if self._writer is not None:
            self._writer.write(frame)

    async def _supervise(self) -> None:
        failures = 0
        patience: asyncio.TimerHandle | None = None
        while True:
            await asyncio.sleep(self._backoff[min(failures, len(self._backoff) - 1)])
            try:
                self.engine = await self._spawn()
                reader, writer = await asyncio.open_unix_connection(self.engine.socket_path, limit=2**22)
            except Exception as error:
                failures += 1
                self.last_error = f"{type(error).__name__} at start"
                logger.warning("engine did not start: %s", error)
                await self._end_engine()
                continue
            failures = 0
            if patience is not None:
                patience.cancel()
            self._writer = writer
            for stream in list(self._streams.values()):
                writer.write(encode_frame(stream.remaining()))
                if stream.aborted:
                    writer.write(encode_frame(AbortSequence(stream.add.sequence_id)))
            self._connected.set()
            await self._read_steps(reader)
            self._connected.clear()
            self._writer = None
            writer.close()
            await self._end_engine()
            self.replacements += 1
            self._settle_after_death()
            patience = asyncio.get_running_loop().call_later(self._ready_wait, self._give_up)

    async def _end_engine(self) -> None:
        if self.engine is not None:
            await self.engine.end()
            self.engine = None

    async def _read_steps(self, reader: asyncio.StreamReader) -> None:
        """Delivers frames until the engine's end of the socket closes."""
        while True:
            try:
                # An engine steps every few seconds also when idle: one that is silent for long hangs.
                head = await asyncio.wait_for(reader.readexactly(4), self._step_wait)
                length = int.from_bytes(head, "big")
                frame = decode_frame(await reader.readexactly(length))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            except asyncio.TimeoutError:
                logger.error("the engine has made no step for %g s and is replaced", self._step_wait)
                return
            except (ValueError, TypeError):
                # Whoever writes that is no engine to be trusted: it is ended like a dead one.
                logger.exception("the engine sent a frame that cannot be read")
                return
            assert isinstance(frame, StepFrame)
            self.last_step = frame
            for output in frame.outputs:
                stream = self._streams.get(output.sequence_id)
                if stream is None:
                    continue
                stream.push(output)
                if stream.released:
                    del self._streams[output.sequence_id]

    def _settle_after_death(self) -> None:
        """The dead engine released everything. What was over anyway, or kills engines, is not carried on."""
        for stream in list(self._streams.values()):
            stream.engine_deaths += 1
            if stream.finish_reason is not None:
                self._finish(stream, None)
            elif stream.aborted:
                self._finish(stream, "abort")
            elif stream.engine_deaths >= MAX_ENGINE_DEATHS:
                self._finish(stream, "error", "two engines died on this request")

    def _give_up(self) -> None:
        """No engine came up in time for those whose engine died: they end, in time (promise C5)."""
        for stream in list(self._streams.values()):
            self._finish(stream, "error", f"its engine died and no other was up within {self._ready_wait:g} s")

    def _finish(self, stream: SequenceStream, reason: str | None, error: str | None = None) -> None:
        """Ends a sequence that no engine has (any more)."""
        sequence_id = stream.add.sequence_id
        stream.push(SequenceOutput(sequence_id, [], reason, released=True, error=error))
        self._streams.pop(sequence_id, None)
