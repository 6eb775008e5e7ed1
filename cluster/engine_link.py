"""One engine at the other end of its socket: frames both ways, and the news that it is lost.

Owns: the connection, the deadline by which an engine must have shown life (`HangWatch`), and ending the engine. Knows
nothing of sequences, of which engine serves and which stands by, or of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol, TypeAlias

from phi_cluster.cluster.frames import Frame, Heartbeat, StepFrame, TakeOver, decode_frame, encode_frame
from phi_cluster.cluster.messages import ProcessId

logger = logging.getLogger(__name__)

HANG_SECONDS = 3.0
# How often it is looked whether the deadline has passed, in deadlines.
_CHECKS = 12

# The process ended; it hangs; what it sent cannot be read.
Loss: TypeAlias = Literal["death", "hang", "fault"]


class EngineHandle(Protocol):
    """A started engine process."""

    process: ProcessId
    socket_path: str

    async def end(self) -> None:
        """Kills it if need be, and returns when its death is proven."""


class HangWatch:
    """Tells a hung engine from a slow one: it hangs if nothing comes from it for `timeout` seconds, and if it is busy
    and computes nothing for so long. Moments are given by the caller, in seconds of one clock."""

    def __init__(self, timeout: float, now: float):
        self._timeout = timeout
        self._heard_at = self._moved_at = self._checked_at = now
        self._progress: int | None = None
        self._step: int | None = None

    def hear(self, frame: Frame, now: float) -> None:
        """The engine has sent this."""
        self._heard_at = now
        if isinstance(frame, Heartbeat):
            moved = not frame.busy or frame.progress != self._progress
            self._progress = frame.progress
        elif isinstance(frame, StepFrame):
            moved = frame.step != self._step
            self._step = frame.step
        else:
            moved = False
        if moved:
            self._moved_at = now

    def verdict(self, now: float) -> str | None:
        """What is wrong with the engine, if anything. To be asked several times within `timeout`."""
        if now - self._checked_at > self._timeout / 2:
            # The asker was held up himself, so what came meanwhile has not been heard: the deadline starts anew.
            self._heard_at = self._moved_at = now
        self._checked_at = now
        if now - self._heard_at > self._timeout:
            return f"has sent nothing for {self._timeout:g} s"
        if now - self._moved_at > self._timeout:
            return f"is busy and has computed nothing for {self._timeout:g} s"
        return None


class EngineLost(Exception):
    """The engine died, or hangs, before it served."""


class EngineLink:
    """A connected engine, which stands by until it is told to take over. For one event loop."""

    def __init__(
        self,
        engine: EngineHandle,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hang_timeout: float,
        clock: Callable[[], float],
    ):
        """Use `start_engine`."""
        self.engine = engine
        self._on_step: Callable[[StepFrame], None] = _ignore
        self._reader = reader
        self._writer = writer
        self._clock = clock
        self._watch = HangWatch(hang_timeout, clock())
        self._interval = hang_timeout / _CHECKS
        loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[Loss] = loop.create_future()
        self._answered: asyncio.Future[None] | None = None
        self._timer = loop.call_later(self._interval, self._check)
        self._reading = loop.create_task(self._read())
        # If it could not be read to its end, it ended.
        self._reading.add_done_callback(lambda _: self._lose("death"))

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def lost(self) -> Loss:
        """Returns when the engine is gone or not to be trusted any more: then `end` it."""
        return await asyncio.shield(self._lost)

    async def take_over(self, on_step: Callable[[StepFrame], None]) -> None:
        """Tells the engine to serve and returns when it has answered: what kills it later may be what it is sent later.
        `on_step` gets each step's frame until the engine is lost. Raises EngineLost."""
        self._on_step = on_step
        self._answered = asyncio.get_running_loop().create_future()
        self.send(TakeOver())
        either: set[asyncio.Future[Any]] = {self._answered, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self.is_lost:
            raise EngineLost(f"engine {self.engine.process.pid} was lost before it served ({self._lost.result()})")

    def send(self, frame: Frame) -> None:
        if not self.is_lost:
            self._writer.write(encode_frame(frame))

    async def end(self) -> None:
        """Returns when the engine's death is proven. Idempotent."""
        self._lose("death")
        # Whatever is still to be sent is for nobody.
        self._writer.transport.abort()
        await self.engine.end()

    async def _read(self) -> None:
        while True:
            try:
                length = int.from_bytes(await self._reader.readexactly(4), "big")
                frame = decode_frame(await self._reader.readexactly(length))
                self._watch.hear(frame, self._clock())
                if isinstance(frame, StepFrame):
                    self._on_step(frame)
                    if self._answered is not None and not self._answered.done():
                        self._answered.set_result(None)
            except (asyncio.IncompleteReadError, OSError):
                return
            except Exception:
                # Whoever writes that is no engine to be trusted: it is ended like a dead one.
                logger.exception("engine %d sent a frame that cannot be read", self.engine.process.pid)
                self._lose("fault")
                return

    def _check(self) -> None:
        why = self._watch.verdict(self._clock())
        if why is not None:
            logger.error("engine %d %s and is replaced", self.engine.process.pid, why)
            self._lose("hang")
        else:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._check)

    def _lose(self, how: Loss) -> None:
        if not self._lost.done():
            self._lost.set_result(how)
            self._timer.cancel()
            self._reading.cancel()


async def start_engine(
    spawn: Callable[[], Awaitable[EngineHandle]],
    hang_timeout: float = HANG_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> EngineLink:
    """A new engine, connected. Raises whatever goes wrong, with nothing left behind."""
    engine = await spawn()
    try:
        reader, writer = await asyncio.open_unix_connection(engine.socket_path, limit=2**22)
    except BaseException:
        await engine.end()
        raise
    return EngineLink(engine, reader, writer, hang_timeout, clock)


def _ignore(frame: StepFrame) -> None:
    pass
