"""The replica's end of the step socket, against an engine that a test plays by hand."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.engine_link import EngineLink, start_engine
from phi_cluster.cluster.errors import Unavailable
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
    StepWork,
    TakeOver,
    decode_frame,
    encode_frame,
)
from phi_cluster.cluster.messages import ProcessId, SegmentRef
from phi_cluster.cluster.sequence_stream import MAX_ENGINE_DEATHS, SequenceStream
from phi_cluster.cluster.standby import StandbyEngines

# Far longer than anything here takes: only a hang ends in it.
PATIENCE = 5.0


class FakeEngine:
    """A socket that answers what the test tells it to. Dies like a process: the connection breaks, then `end` returns
    once the death is allowed to be seen."""

    def __init__(self, number: int, folder: Path):
        self.process = ProcessId(1000 + number, number)
        self._path = str(folder / f"{number}.sock")
        # Called in the moment in which the client connects.
        self.on_connect: Callable[[], None] = lambda: None
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.serves = False
        # Otherwise it dies of the first frame.
        self.answers = True
        self.ended = False
        self.may_end = asyncio.Event()
        self.may_end.set()
        self._connected = asyncio.Event()
        self._is_dialled = False
        self._step = 0

    @property
    def socket_path(self) -> str:
        self._is_dialled = True
        self.on_connect()
        return self._path

    async def listen(self) -> FakeEngine:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._connected.set()
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(4), "big")
                frame = decode_frame(await reader.readexactly(length))
                if isinstance(frame, TakeOver):
                    # Before everything else, and once.
                    assert self.frames.empty()
                    assert not self.serves
                    if not self.answers:
                        writer.transport.abort()
                        return
                    self.serves = True
                    writer.write(encode_frame(StepFrame(0, [], 0, 0)))
                else:
                    self.frames.put_nowait(frame)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            # At the end of the test's loop.
            return

    async def next(self, kind: type[Any]) -> Any:
        frame = await asyncio.wait_for(self.frames.get(), PATIENCE)
        assert isinstance(frame, kind), frame
        return frame

    async def send(
        self,
        *outputs: SequenceOutput,
        running: int = 1,
        totals: EngineTotals = NO_TOTALS,
        work: StepWork | None = None,
        preempted: tuple[int, ...] = (),
    ) -> None:
        """One step."""
        self._step += 1
        frame = StepFrame(self._step, list(outputs), running, 0, totals, work, preempted=preempted)
        await self.send_bytes(encode_frame(frame))

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.wait_for(self._connected.wait(), PATIENCE)
        self._writer.write(data)
        await self._writer.drain()

    def die(self, *, seen: bool = True) -> None:
        if not seen:
            self.may_end.clear()
        self._writer.transport.abort()

    async def end(self) -> None:
        await self.may_end.wait()
        self.ended = True
        if self._is_dialled:
            # The other side may know a moment earlier that it is connected.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._connected.wait(), 0.05)
        self._server.close()
        if self._connected.is_set():
            self._writer.transport.abort()


class Engines:
    """Starts engines; `failures` starts fail first, and while `may_start` is not set they hang."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.failures = 0
        self.attempts = 0
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.on_connect: Callable[[], None] = lambda: None
        self.answers = True
        self._started: asyncio.Queue[FakeEngine] = asyncio.Queue()
        self.all: list[FakeEngine] = []

    async def spawn(self) -> FakeEngine:
        self.attempts += 1
        await self.may_start.wait()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no room for an engine")
        engine = FakeEngine(len(self.all) + 1, self._folder)
        engine.on_connect, engine.answers = self.on_connect, self.answers
        self.all.append(engine)
        await engine.listen()
        self._started.put_nowait(engine)
        return engine

    async def start(self) -> EngineLink:
        return await start_engine(self.spawn, hang_timeout=60.0)

    async def next(self) -> FakeEngine:
        return await asyncio.wait_for(self._started.get(), PATIENCE)


@pytest.fixture
def engines(tmp_path: Path) -> Engines:
    return Engines(tmp_path)


MakeClient = Callable[..., EngineClient]


@pytest.fixture
async def make_client(engines: Engines) -> AsyncIterator[MakeClient]:
    made: list[EngineClient] = []

    def make(num_standbys: int = 0, **options: Any) -> EngineClient:
        defaults: dict[str, Any] = {"ready_wait": PATIENCE, "backoff": (0.0,)}
        standbys = StandbyEngines(num_standbys, engines.start, pauses=(0.0,))
        client = EngineClient(engines.start, standbys, **(defaults | options))
        made.append(client)
        client.start()
        return client

    yield make
    for engine in engines.all:
        engine.may_end.set()
    engines.may_start.set()
    for client in made:
        await client.close()


def add(client: EngineClient, prompt: list[int] | None = None, **changes: Any) -> AddSequence:
    prompt = [1, 2, 3] if prompt is None else prompt
    fields: dict[str, Any] = {
        "sequence_id": client.next_sequence_id(),
        "segment": SegmentRef(7, 8, b"nonce"),
        "epoch": 3,
        "num_kept_tokens": 4,
        "token_ids": prompt,
        "sampling": {"seed": 5, "max_tokens": 100},
        "max_num_tokens": 50,
        "num_prompt_tokens": 4 + len(prompt),
    }
    return AddSequence(**(fields | changes))


async def collect(stream: SequenceStream) -> list[SequenceOutput]:
    async def read() -> list[SequenceOutput]:
        return [output async for output in stream]

    return await asyncio.wait_for(read(), PATIENCE)


async def until(check: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not check():  # noqa: ASYNC110 -- one turn of the loop, not a sleep
            await asyncio.sleep(0)

    await asyncio.wait_for(poll(), PATIENCE)


def ids(outputs: list[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def test_a_sequence_from_add_to_release(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    asked = add(client)
    stream = await client.add(asked)
    engine = await engines.next()
    assert client.ready
    assert client.engine is engine
    assert await engine.next(AddSequence) == asked
    await engine.send(SequenceOutput(asked.sequence_id, [10], num_cached_tokens=3), running=1)
    await engine.send(SequenceOutput(asked.sequence_id, [11, 12]))
    await engine.send(SequenceOutput(asked.sequence_id, [13], "stop"))
    await engine.send(SequenceOutput(asked.sequence_id, [], released=True), running=0)
    outputs = await collect(stream)
    assert ids(outputs) == stream.received == [10, 11, 12, 13]
    assert outputs[0].num_cached_tokens == 3
    assert stream.finish_reason == "stop"
    assert outputs[-1].released
    assert stream.released
    assert client.num_streams == 0
    assert (client.last_step.step, client.last_step.num_running) == (4, 0)
    assert client.replacements == 0


async def test_sequences_get_their_own_outputs_and_ids(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    streams = [await client.add(add(client)) for _ in range(3)]
    engine = await engines.next()
    numbers = [(await engine.next(AddSequence)).sequence_id for _ in streams]
    assert len(set(numbers)) == 3
    # One step for all, and something for a sequence that nobody knows (any more).
    outputs = [SequenceOutput(n, [n * 100], "length", released=True) for n in numbers]
    await engine.send(SequenceOutput(999, [1]), *outputs)
    for number, stream in zip(numbers, streams, strict=True):
        assert ids(await collect(stream)) == [number * 100]


class Watching:
    """Implements sequence_stream.SequenceWatcher."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_scheduled(self, queue_seconds: float) -> None:
        self.told.append(queue_seconds)

    def on_tokens(self) -> None:
        self.told.append("tokens")

    def on_preempted(self) -> None:
        self.told.append("preempted")

    def on_moved(self, *, died: bool) -> None:
        self.told.append("lost" if died else "renewed")


async def test_who_watches_a_sequence_is_told_how_it_fares(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream, other = [await client.add(add(client)) for _ in range(2)]
    stream.watcher = watching = Watching()
    first = await engines.next()
    number = (await first.next(AddSequence)).sequence_id
    await first.next(AddSequence)
    await first.send(SequenceOutput(number, [], queue_seconds=0.25), preempted=(other.add.sequence_id, 999))
    await first.send(SequenceOutput(number, [10]), preempted=(number,))
    await until(lambda: len(watching.told) == 3)
    first.die()
    second = await engines.next()
    await second.next(AddSequence)
    await second.next(AddSequence)
    await second.send(SequenceOutput(number, [11], "stop", released=True, queue_seconds=0.5))
    await collect(stream)
    assert watching.told == [0.25, "preempted", "tokens", "lost", 0.5, "tokens"]


async def test_an_abort_is_sent_once_and_release_still_comes(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    number = (await engine.next(AddSequence)).sequence_id
    client.abort(stream)
    client.abort(stream)
    assert await engine.next(AbortSequence) == AbortSequence(number)
    # The step in flight brings a token still.
    await engine.send(SequenceOutput(number, [10]))
    await engine.send(SequenceOutput(number, [], "abort", released=True))
    outputs = await collect(stream)
    assert [o.finish_reason for o in outputs] == [None, "abort"]
    client.abort(stream)
    client.extend(stream, 99)
    assert await engine.next(ExtendSequence) == ExtendSequence(number, 99)
    assert engine.frames.empty()


async def test_a_lease_is_extended_also_for_the_next_engine(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    first = await engines.next()
    number = (await first.next(AddSequence)).sequence_id
    client.extend(stream, 200)
    assert await first.next(ExtendSequence) == ExtendSequence(number, 200)
    first.die()
    second = await engines.next()
    assert (await second.next(AddSequence)).max_num_tokens == 200


async def test_a_sequence_goes_on_with_the_next_engine(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    asked = add(client)
    stream = await client.add(asked)
    first = await engines.next()
    await first.next(AddSequence)
    await first.send(SequenceOutput(asked.sequence_id, [10], num_cached_tokens=2))
    await first.send(SequenceOutput(asked.sequence_id, [11]))
    await until(lambda: len(stream.received) == 2)
    first.die()
    second = await engines.next()
    # Its death was proven before there was another who may write.
    assert first.ended
    again = await second.next(AddSequence)
    assert again.token_ids == [*asked.token_ids, 10, 11]
    assert (again.num_kept_tokens, again.num_prompt_tokens) == (asked.num_kept_tokens, asked.num_prompt_tokens)
    assert (again.sequence_id, again.segment, again.sampling) == (asked.sequence_id, asked.segment, asked.sampling)
    await second.send(SequenceOutput(asked.sequence_id, [12], "stop", released=True))
    assert ids(await collect(stream)) == [10, 11, 12]
    assert client.replacements == 1


async def test_nothing_goes_on_before_the_old_engine_is_dead(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    first = await engines.next()
    await first.next(AddSequence)
    first.die(seen=False)
    await until(lambda: not client.ready)
    # The client leaves meanwhile: the engine may still write, so this is no release yet.
    client.abort(stream)
    await asyncio.sleep(0.002)
    assert not stream.released
    assert engines.attempts == 1
    first.may_end.set()
    assert [o.finish_reason for o in await collect(stream)] == ["abort"]


async def test_tokens_come_exactly_once_whatever_dies_when(engines: Engines, make_client: MakeClient) -> None:
    """Each engine goes on counting where the ids that it was given end; each dies after a random number of steps."""
    rng = random.Random(5)
    client = make_client()
    length = 12
    streams: dict[int, SequenceStream] = {}

    async def play(engine: FakeEngine, known: dict[int, int], steps: int) -> None:
        for _ in range(steps):
            while not engine.frames.empty():
                frame = engine.frames.get_nowait()
                assert isinstance(frame, AddSequence)
                known[frame.sequence_id] = frame.num_kept_tokens + len(frame.token_ids) - frame.num_prompt_tokens
            outputs = []
            for number, count in list(known.items()):
                # A step may bring nothing, one token or (after a burst) two.
                new = range(count, min(count + rng.choice([0, 1, 1, 1, 2]), length))
                known[number] = count + len(new)
                over = known[number] == length
                outputs.append(SequenceOutput(number, list(new), "length" if over else None, released=over))
                if over:
                    del known[number]
            await engine.send(*outputs)
            await asyncio.sleep(0)

    for _ in range(12):
        for _ in range(2):
            stream = await client.add(add(client, [rng.randrange(9)] * rng.randrange(1, 5)))
            streams[stream.add.sequence_id] = stream
        engine = await engines.next()
        await until(lambda engine=engine: not engine.frames.empty())  # type: ignore[misc]
        await play(engine, {}, rng.randrange(1, 30))
        engine.die()
    engine = await engines.next()
    known: dict[int, int] = {}
    while client.num_streams:
        await play(engine, known, 1)
    carried_on = 0
    for stream in streams.values():
        outputs = await collect(stream)
        got = ids(outputs)
        assert got == list(range(len(got))), "a token is missing or came twice"
        assert sum(o.finish_reason is not None for o in outputs) == 1
        assert sum(o.released for o in outputs) == 1
        if outputs[-1].finish_reason == "error":
            assert stream.is_poisonous
        else:
            assert len(got) == length
            carried_on += stream.engine_deaths
    assert carried_on > 3


async def test_a_death_between_turns_harms_nobody(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    await client.wait_ready()
    first = await engines.next()
    await first.send(running=0)
    await until(lambda: client.last_step.step == 1)
    first.die()
    second = await engines.next()
    stream = await client.add(add(client))
    assert client.engine is second
    number = (await second.next(AddSequence)).sequence_id
    await second.send(SequenceOutput(number, [1], "stop", released=True))
    assert ids(await collect(stream)) == [1]
    assert stream.engine_deaths == 0
    assert client.replacements == 1


@pytest.mark.parametrize("deaths", [2, MAX_ENGINE_DEATHS - 1, MAX_ENGINE_DEATHS])
async def test_who_gets_on_between_deaths_is_carried_on_but_not_for_ever(
    engines: Engines, make_client: MakeClient, deaths: int
) -> None:
    client = make_client()
    stream = await client.add(add(client))
    for token_id in range(deaths):
        engine = await engines.next()
        await engine.next(AddSequence)
        await engine.send(SequenceOutput(stream.add.sequence_id, [token_id]))
        await until(lambda token_id=token_id: stream.received[-1:] == [token_id])  # type: ignore[misc]
        engine.die()
    if deaths < MAX_ENGINE_DEATHS:
        last = await engines.next()
        await last.next(AddSequence)
        await last.send(SequenceOutput(stream.add.sequence_id, [99], "stop", released=True))
    outputs = await collect(stream)
    assert ids(outputs)[:deaths] == list(range(deaths))
    assert outputs[-1].finish_reason == ("stop" if deaths < MAX_ENGINE_DEATHS else "error")


async def test_who_killed_two_engines_is_not_tried_on_a_third(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    poison = await client.add(add(client))
    first = await engines.next()
    await first.next(AddSequence)
    await first.send(SequenceOutput(poison.add.sequence_id, [10]))
    await until(lambda: poison.received == [10])
    first.die()
    second = await engines.next()
    await second.next(AddSequence)
    innocent = await client.add(add(client))
    await second.next(AddSequence)
    second.die()
    outputs = await collect(poison)
    assert ids(outputs) == [10]
    assert (outputs[-1].finish_reason, outputs[-1].error) == ("error", "engines died on it")
    third = await engines.next()
    again = await third.next(AddSequence)
    assert again.sequence_id == innocent.add.sequence_id
    await third.send(SequenceOutput(again.sequence_id, [], "stop", released=True))
    await collect(innocent)
    assert third.frames.empty()


async def test_what_was_over_is_over_although_its_engine_died(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    number = (await engine.next(AddSequence)).sequence_id
    await engine.send(SequenceOutput(number, [10], "stop"))
    await until(lambda: stream.finish_reason == "stop")
    engine.die()
    outputs = await collect(stream)
    assert ids(outputs) == [10]
    assert [o.finish_reason for o in outputs] == ["stop", None]
    second = await engines.next()
    await client.wait_ready()
    assert second.frames.empty()


async def test_an_aborted_sequence_ends_with_its_engine(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    await engine.next(AddSequence)
    client.abort(stream)
    await engine.next(AbortSequence)
    engine.die()
    assert [(o.finish_reason, o.released) for o in await collect(stream)] == [("abort", True)]


async def test_an_abort_between_engines_is_a_release(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    await engine.next(AddSequence)
    engines.may_start.clear()
    engine.die()
    await until(lambda: engines.attempts == 2)
    assert not stream.released
    client.abort(stream)
    assert [(o.finish_reason, o.released) for o in await collect(stream)] == [("abort", True)]
    assert client.num_streams == 0


async def test_an_abort_while_the_next_engine_is_connected_is_a_release(
    engines: Engines, make_client: MakeClient
) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    await engine.next(AddSequence)
    engines.on_connect = lambda: client.abort(stream)
    engine.die()
    second = await engines.next()
    assert [(o.finish_reason, o.released) for o in await collect(stream)] == [("abort", True)]
    await client.wait_ready()
    assert second.frames.empty()


async def test_a_sequence_does_not_wait_for_ever_for_an_engine(engines: Engines, make_client: MakeClient) -> None:
    client = make_client(ready_wait=0.01)
    stream = await client.add(add(client))
    engine = await engines.next()
    await engine.next(AddSequence)
    engines.may_start.clear()
    engine.die()
    outputs = await collect(stream)
    assert outputs[-1].finish_reason == "error"
    assert "no other was up" in str(outputs[-1].error)
    assert client.num_streams == 0


async def test_an_engine_in_time_ends_the_waiting(engines: Engines, make_client: MakeClient) -> None:
    client = make_client(ready_wait=0.02)
    stream = await client.add(add(client))
    engine = await engines.next()
    number = (await engine.next(AddSequence)).sequence_id
    engine.die()
    second = await engines.next()
    await second.next(AddSequence)
    # Longer than anyone would have waited without an engine.
    await asyncio.sleep(0.03)
    assert not stream.released
    await second.send(SequenceOutput(number, [1], "stop", released=True))
    assert ids(await collect(stream)) == [1]


async def test_failing_starts_are_repeated_with_pauses(engines: Engines, make_client: MakeClient) -> None:
    pauses: list[int] = []

    class Backoff(tuple[float, ...]):
        def __getitem__(self, failures: Any) -> Any:
            pauses.append(failures)
            return super().__getitem__(failures)

    engines.failures = 4
    client = make_client(backoff=Backoff((0.0, 0.001, 0.002)))
    await client.wait_ready()
    assert engines.attempts == 5
    # Longer and longer, up to the longest; a start that succeeds begins anew.
    assert pauses == [0, 1, 2, 2, 2]
    (await engines.next()).die()
    await engines.next()
    assert pauses[5:] == [0]


async def test_waiting_for_an_engine_is_bounded_and_says_why(engines: Engines, make_client: MakeClient) -> None:
    engines.failures = 10**6
    client = make_client(ready_wait=0.005, backoff=(0.0, 0.001))
    for call in (client.wait_ready, lambda: client.add(add(client)), lambda: client.wait_ready(0.001)):
        with pytest.raises(Unavailable, match="RuntimeError at start") as caught:
            await asyncio.wait_for(call(), PATIENCE)
        assert caught.value.retry_after
    assert client.num_streams == 0
    assert not client.ready


async def test_a_start_whose_socket_does_not_answer_is_a_failed_one(tmp_path: Path) -> None:
    class Deaf(FakeEngine):
        async def listen(self) -> FakeEngine:
            await super().listen()
            self._path += ".not-there"
            return self

    started: list[FakeEngine] = []

    async def spawn() -> FakeEngine:
        kind = Deaf if not started else FakeEngine
        started.append(await kind(len(started), tmp_path).listen())
        return started[-1]

    async def start() -> EngineLink:
        return await start_engine(spawn)

    client = EngineClient(start, StandbyEngines(0, start), ready_wait=PATIENCE, backoff=(0.0,))
    client.start()
    await client.wait_ready()
    assert started[0].ended
    assert client.engine is started[1]
    await client.close()
    assert started[1].ended


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\x03abc", b"\0\0\0\x01\x93", encode_frame(AbortSequence(1)).replace(b"abort", b"xbort")]
)
async def test_an_engine_that_sends_garbage_is_replaced(
    garbage: bytes, engines: Engines, make_client: MakeClient
) -> None:
    client = make_client()
    stream = await client.add(add(client))
    first = await engines.next()
    number = (await first.next(AddSequence)).sequence_id
    await first.send_bytes(garbage)
    second = await engines.next()
    assert first.ended
    assert (await second.next(AddSequence)).sequence_id == number
    await second.send(SequenceOutput(number, [1], "stop", released=True))
    assert ids(await collect(stream)) == [1]


async def test_a_frame_may_come_in_pieces_and_be_large(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    number = (await engine.next(AddSequence)).sequence_id
    many = list(range(200_000))
    data = encode_frame(StepFrame(1, [SequenceOutput(number, many, "stop", released=True)], 0, 0))
    for piece in (data[:3], data[3:5], data[5:1000], data[1000:]):
        await engine.send_bytes(piece)
        await asyncio.sleep(0)
    assert ids(await collect(stream)) == many


async def test_closing_ends_the_engine_and_every_stream(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    engine = await engines.next()
    await client.close()
    assert engine.ended
    assert (await collect(stream))[-1].finish_reason == "error"
    await asyncio.sleep(0.002)
    assert engines.attempts == 1


async def test_closing_before_an_engine_is_up(engines: Engines, make_client: MakeClient) -> None:
    engines.may_start.clear()
    client = make_client()
    await until(lambda: engines.attempts == 1)
    closing: Awaitable[None] = client.close()
    await asyncio.wait_for(closing, PATIENCE)
    assert engines.all == []


# Engines that stand by.


async def test_a_standby_engine_takes_over_at_once(engines: Engines, make_client: MakeClient) -> None:
    client = make_client(num_standbys=1)
    asked = add(client)
    stream = await client.add(asked)
    first, standby = await engines.next(), await engines.next()
    await first.next(AddSequence)
    assert first.serves
    await first.send(SequenceOutput(asked.sequence_id, [10]))
    await until(lambda: stream.received == [10])
    # Nothing can be started any more.
    engines.may_start.clear()
    first.die()
    assert (await standby.next(AddSequence)).token_ids == [*asked.token_ids, 10]
    assert standby.serves
    assert first.ended
    assert client.engine is standby
    await standby.send(SequenceOutput(asked.sequence_id, [11], "stop", released=True))
    assert ids(await collect(stream)) == [10, 11]
    assert client.recoveries == {"death": 1}
    # The next one to stand by is being started.
    await until(lambda: engines.attempts == 3)
    engines.may_start.set()
    third = await engines.next()
    standby.die()
    await until(lambda: client.engine is third)


async def test_what_a_standby_engine_says_is_no_step_of_the_replicas(engines: Engines, make_client: MakeClient) -> None:
    client = make_client(num_standbys=1)
    stream = await client.add(add(client))
    first, standby = await engines.next(), await engines.next()
    number = (await first.next(AddSequence)).sequence_id
    await standby.send(SequenceOutput(number, [66], "stop", released=True), running=7)
    await asyncio.sleep(0.002)
    await first.send(SequenceOutput(number, [1], "stop", released=True), running=0)
    assert ids(await collect(stream)) == [1]
    assert client.last_step.num_running == 0


async def test_a_hung_engine_is_replaced_like_a_dead_one(engines: Engines, make_client: MakeClient) -> None:
    """It says nothing for too long; what it says after that is not heard."""

    async def start() -> EngineLink:
        return await start_engine(engines.spawn, hang_timeout=0.05 if not engines.all else 60.0)

    client = EngineClient(start, StandbyEngines(0, start), ready_wait=PATIENCE, backoff=(0.0,))
    client.start()
    stream = await client.add(add(client))
    first = await engines.next()
    number = (await first.next(AddSequence)).sequence_id
    for token_id in (10, 11):
        await first.send(SequenceOutput(number, [token_id]))
    first.may_end.clear()
    await until(lambda: not client.ready)
    with contextlib.suppress(ConnectionError):
        await first.send(SequenceOutput(number, [12]))
    await asyncio.sleep(0.005)
    assert stream.received == [10, 11]
    first.may_end.set()
    second = await engines.next()
    assert (await second.next(AddSequence)).token_ids[-2:] == [10, 11]
    assert client.recoveries == {"hang": 1}
    await second.send(SequenceOutput(number, [12], "stop", released=True))
    assert ids(await collect(stream)) == [10, 11, 12]
    await client.close()


async def test_closing_ends_the_standby_engines_too(engines: Engines, make_client: MakeClient) -> None:
    client = make_client(num_standbys=2)
    started = [await engines.next() for _ in range(3)]
    await client.close()
    assert all(engine.ended for engine in started)
    await asyncio.sleep(0.002)
    assert engines.attempts == 3


async def test_engines_that_were_dead_already_are_nobodys_fault(engines: Engines, make_client: MakeClient) -> None:
    """All are killed at once; the news of the second death comes with the first frame sent there."""
    client = make_client(num_standbys=2)
    stream = await client.add(add(client))
    first = await engines.next()
    standbys = [await engines.next(), await engines.next()]
    number = (await first.next(AddSequence)).sequence_id
    for standby in standbys:
        standby.answers = False
    first.die()
    fresh = await engines.next()
    assert (await fresh.next(AddSequence)).sequence_id == number
    assert all(standby.ended for standby in standbys)
    assert stream.engine_deaths == 1
    await fresh.send(SequenceOutput(number, [1], "stop", released=True))
    assert ids(await collect(stream)) == [1]


async def test_an_engine_that_dies_before_it_serves_is_a_start_that_failed(
    engines: Engines, make_client: MakeClient
) -> None:
    engines.may_start.clear()
    client = make_client(ready_wait=0.05)
    await until(lambda: engines.attempts == 1)
    engines.answers = False
    engines.may_start.set()
    with pytest.raises(Unavailable, match="EngineLost at start"):
        await client.wait_ready()
    assert client.replacements == 0
    assert engines.attempts > 1
    engines.answers = True
    await client.wait_ready(PATIENCE)


# Engines that are renewed.


@pytest.mark.parametrize("num_standbys", [0, 1])
async def test_a_recycled_engine_is_succeeded_between_two_steps(
    engines: Engines, make_client: MakeClient, num_standbys: int
) -> None:
    client = make_client(num_standbys)
    stream, leaving, done = [await client.add(add(client)) for _ in range(3)]
    first = await engines.next()
    for _ in range(3):
        await first.next(AddSequence)
    await first.send(SequenceOutput(stream.add.sequence_id, [10], num_cached_tokens=0))
    await first.send(SequenceOutput(done.add.sequence_id, [1], "stop", released=True))
    await until(lambda: stream.received == [10])
    if num_standbys:
        await until(lambda: len(engines.all) == 2)
    assert await client.recycle("leak")
    # One at a time.
    assert not await client.recycle("leak")
    await first.next(StepDown)
    # What is on its way, and what is asked of it now, is not lost.
    client.abort(leaving)
    late = await client.add(add(client))
    await first.send(SequenceOutput(stream.add.sequence_id, [11]))
    await until(lambda: stream.received == [10, 11])
    first.die()
    second = await engines.next()
    added = [await second.next(AddSequence) for _ in range(2)]
    assert [one.sequence_id for one in added] == [stream.add.sequence_id, late.add.sequence_id]
    assert added[0].token_ids == [*stream.add.token_ids, 10, 11]
    assert first.ended
    assert (await collect(leaving))[-1].finish_reason == "abort"
    await second.send(SequenceOutput(stream.add.sequence_id, [12], "stop", released=True))
    assert ids(await collect(stream)) == [10, 11, 12]
    assert (stream.was_moved, stream.engine_deaths) == (True, 0)
    assert (dict(client.recycles), client.replacements) == ({"leak": 1}, 0)
    assert client.engine is second


async def test_a_successor_that_cannot_start_changes_nothing(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    await client.wait_ready()
    first = await engines.next()
    engines.failures = 1
    with pytest.raises(RuntimeError, match="no room"):
        await client.recycle("max_age")
    assert client.engine is first
    assert await client.recycle("max_age")


async def test_an_engine_that_dies_before_its_successor_is_up(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    stream = await client.add(add(client))
    first = await engines.next()
    await first.next(AddSequence)
    engines.may_start.clear()
    recycling = asyncio.ensure_future(client.recycle("max_age"))
    await until(lambda: engines.attempts == 2)
    first.die()
    await until(lambda: engines.attempts == 3)
    engines.may_start.set()
    assert not await recycling
    await client.wait_ready()
    assert (client.replacements, client.recycles.total()) == (1, 0)
    serving = client.engine
    assert [engine.ended for engine in engines.all if engine is not serving] == [True, True]
    assert isinstance(serving, FakeEngine)
    assert (await serving.next(AddSequence)).sequence_id == stream.add.sequence_id
    assert stream.engine_deaths == 1


async def test_totals_go_on_counting_when_an_engine_is_replaced(engines: Engines, make_client: MakeClient) -> None:
    client = make_client()
    engine = await engines.next()
    await client.wait_ready(PATIENCE)
    await engine.send(totals=EngineTotals(1, 8, 5))
    await engine.send(totals=EngineTotals(2, 9, 5))
    await until(lambda: client.totals == EngineTotals(2, 9, 5))
    engine.die()
    engine = await engines.next()
    await until(lambda: engine.serves)
    await engine.send(totals=EngineTotals(1, 1, 1))
    await until(lambda: client.totals == EngineTotals(3, 10, 6))


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float]] = []
        self.queued: list[float] = []
        self.pauses: list[float] = []

    def on_step(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        self.steps.append((num_seqs, num_tokens, seconds))

    def on_scheduled(self, queue_seconds: float) -> None:
        self.queued.append(queue_seconds)

    def on_recovered(self, seconds: float) -> None:
        self.pauses.append(seconds)


async def test_an_observer_sees_steps_waiting_and_recoveries_but_no_renewals(
    engines: Engines, make_client: MakeClient
) -> None:
    seen = Seen()
    client = make_client(observer=seen)
    engine = await engines.next()
    stream = await client.add(add(client))
    number = stream.add.sequence_id
    await engine.send(work=None)
    await engine.send(SequenceOutput(number, [1], queue_seconds=0.25), work=StepWork(1, 30, 0.5))
    await engine.send(SequenceOutput(number, [2]), work=StepWork(1, 1, 0.125))
    await until(lambda: len(seen.steps) == 2)
    assert (seen.steps, seen.queued, seen.pauses) == ([(1, 30, 0.5), (1, 1, 0.125)], [0.25], [])
    engine.die()
    engine = await engines.next()
    await until(lambda: engine.serves and client.ready)
    assert len(seen.pauses) == 1
    # Renewed as it was told to: nothing was lost.
    recycling = asyncio.create_task(client.recycle("leak"))
    successor = await engines.next()
    assert await recycling
    engine.die()
    await until(lambda: successor.serves and client.ready)
    assert (client.recycles.total(), len(seen.pauses)) == (1, 1)
