"""Hung engines and slow ones, and the connection to an engine that a test plays by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from phi_cluster.cluster.engine_link import EngineLink, EngineLost, HangWatch, start_engine
from phi_cluster.cluster.frames import (
    AbortSequence,
    Frame,
    Heartbeat,
    SequenceOutput,
    StepFrame,
    TakeOver,
    decode_frame,
    encode_frame,
)
from phi_cluster.cluster.messages import ProcessId

# Only a hang ends in it.
PATIENCE = 5.0


def watched(seconds: float, tell: Callable[[float], Frame | None], timeout: float = 3.0) -> tuple[float, str | None]:
    """Runs a watch that is asked ten times a second for so long; `tell` says what the engine sends at a moment. Returns
    when the engine was taken for hung, and why."""
    watch = HangWatch(timeout, 0.0)
    for tenth in range(1, round(seconds * 10) + 1):
        now = tenth / 10
        frame = tell(now)
        if frame is not None:
            watch.hear(frame, now)
        why = watch.verdict(now)
        if why is not None:
            return now, why
    return seconds, None


def test_an_idle_engine_that_beats_does_not_hang() -> None:
    assert watched(1000, lambda now: Heartbeat(7, False) if round(now * 10) % 5 == 0 else None)[1] is None


def test_a_stopped_engine_is_found() -> None:
    at, why = watched(10, lambda now: Heartbeat(7, False) if now <= 2 else None)
    assert at == pytest.approx(5.1)
    assert why == "has sent nothing for 3 s"


def test_a_step_may_take_as_long_as_it_gets_on() -> None:
    """A minute for a step, with a layer every 2.5 s."""
    assert watched(60, lambda now: Heartbeat(int(now / 2.5), True))[1] is None


def test_a_step_that_does_not_get_on_is_found_although_the_process_beats() -> None:
    at, why = watched(60, lambda now: Heartbeat(int(min(now, 20.0)), True))
    assert at == pytest.approx(23.1)
    assert why == "is busy and has computed nothing for 3 s"


def test_work_that_begins_after_a_long_pause_has_its_own_time() -> None:
    """The counter does not grow while there is nothing to do."""
    assert watched(12, lambda now: Heartbeat(5, False) if now < 10 else Heartbeat(5, True))[1] is None
    at, _ = watched(20, lambda now: Heartbeat(5, False) if now < 10 else Heartbeat(5, True))
    assert at == pytest.approx(13.0)


def test_steps_are_signs_of_life_and_the_same_step_again_is_none() -> None:
    assert watched(60, lambda now: StepFrame(round(now * 10), [], 1, 0))[1] is None
    at, why = watched(60, lambda now: StepFrame(5, [], 1, 0))
    assert at == pytest.approx(3.2)
    assert str(why).startswith("is busy")


def test_a_watch_that_was_held_up_itself_does_not_blame_the_engine() -> None:
    watch = HangWatch(3.0, 0.0)
    assert watch.verdict(0.2) is None
    # What came in these seconds lies in the socket, unread.
    assert watch.verdict(60.0) is None
    for tenth in range(1, 31):
        assert watch.verdict(60.0 + tenth / 10) is None
    assert watch.verdict(63.1) is not None


class Peer:
    """An engine's end of the socket."""

    def __init__(self, path: Path):
        self.process = ProcessId(1234, 1)
        self.socket_path = str(path)
        self.ends = 0

    async def listen(self) -> Peer:
        self._accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.get_running_loop().create_future()
        )
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: self._accepted.set_result((reader, writer)), self.socket_path
        )
        return self

    async def streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(asyncio.shield(self._accepted), PATIENCE)

    async def send(self, *frames: Frame) -> None:
        _, writer = await self.streams()
        writer.write(b"".join(map(encode_frame, frames)))
        await writer.drain()

    async def read(self) -> Frame:
        reader, _ = await self.streams()
        length = int.from_bytes(await asyncio.wait_for(reader.readexactly(4), PATIENCE), "big")
        return decode_frame(await reader.readexactly(length))

    async def die(self) -> None:
        (await self.streams())[1].transport.abort()

    async def end(self) -> None:
        self.ends += 1
        self._server.close()
        if self._accepted.done():
            await self.die()


@pytest.fixture
async def peer(tmp_path: Path) -> Peer:
    return await Peer(tmp_path / "engine.sock").listen()


async def connect(peer: Peer, hang_timeout: float = 60.0) -> tuple[EngineLink, list[StepFrame]]:
    async def spawn() -> Peer:
        return peer

    link = await start_engine(spawn, hang_timeout)
    steps: list[StepFrame] = []
    taking = asyncio.create_task(link.take_over(steps.append))
    assert await peer.read() == TakeOver()
    assert not taking.done()
    await peer.send(Heartbeat(1, False), StepFrame(0, [], 0, 0))
    await asyncio.wait_for(taking, PATIENCE)
    assert steps.pop().step == 0
    return link, steps


async def loss(link: EngineLink) -> str:
    return await asyncio.wait_for(link.lost(), PATIENCE)


async def test_frames_go_both_ways(peer: Peer) -> None:
    link, steps = await connect(peer)
    link.send(AbortSequence(3))
    link.send(AbortSequence(4))
    assert [await peer.read(), await peer.read()] == [AbortSequence(3), AbortSequence(4)]
    frames = [StepFrame(1, [SequenceOutput(3, [5])], 1, 0), StepFrame(2, [], 0, 0)]
    await peer.send(frames[0], Heartbeat(9, True), frames[1])
    await peer.die()
    assert await loss(link) == "death"
    # What it sent before it died has come.
    assert steps == frames
    await link.end()
    await link.end()
    assert peer.ends == 2


async def test_a_silent_engine_is_lost_and_not_heard_any_more(peer: Peer) -> None:
    link, steps = await connect(peer, hang_timeout=0.05)
    for step in range(20):
        await asyncio.sleep(0.01)
        await peer.send(StepFrame(step, [], 1, 0))
    assert not link.is_lost
    assert await loss(link) == "hang"
    heard = len(steps)
    await peer.send(StepFrame(99, [], 1, 0))
    link.send(AbortSequence(3))
    await asyncio.sleep(0.01)
    assert len(steps) == heard
    await link.end()


@pytest.mark.parametrize("garbage", [b"\0\0\0\x03abc", b"\0\0\0\x01\x93"])
async def test_an_engine_that_sends_garbage_is_lost(garbage: bytes, peer: Peer) -> None:
    link, _ = await connect(peer)
    _, writer = await peer.streams()
    writer.write(garbage)
    assert await loss(link) == "fault"
    await link.end()


async def test_whoever_asks_may_be_cancelled(peer: Peer) -> None:
    link, _ = await connect(peer)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(link.lost(), 0.01)
    assert not link.is_lost
    await link.end()
    assert await loss(link) == "death"


async def test_a_started_engine_that_cannot_be_reached_is_ended(peer: Peer) -> None:
    peer.socket_path += ".not-there"
    with pytest.raises(OSError, match="No such file"):
        await connect(peer)
    assert peer.ends == 1


@pytest.mark.parametrize("how", ["death", "hang"])
async def test_one_that_is_lost_before_it_serves_says_so(how: str, peer: Peer) -> None:
    async def spawn() -> Peer:
        return peer

    link = await start_engine(spawn, 0.05 if how == "hang" else 60.0)
    taking = asyncio.create_task(link.take_over(lambda frame: None))
    assert await peer.read() == TakeOver()
    if how == "death":
        await peer.die()
    with pytest.raises(EngineLost, match=rf"1234 was lost before it served \({how}\)"):
        await asyncio.wait_for(taking, PATIENCE)
    await link.end()
