"""Engines that stand by: how many there are, when they are started, and what becomes of those that are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from phi_cluster.cluster.engine_link import EngineLink
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.standby import StandbyEngines

# Only a hang ends in it.
PATIENCE = 5.0


class FakeLink:
    """A connected engine that is lost when the test says so."""

    def __init__(self, number: int):
        self.engine = self
        self.process = ProcessId(number, 1)
        self.ended = False
        self.may_end = asyncio.Event()
        self.may_end.set()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def lost(self) -> str:
        return await asyncio.shield(self._lost)

    def lose(self, how: str = "death") -> None:
        self._lost.set_result(how)

    async def end(self) -> None:
        await self.may_end.wait()
        self.ended = True


class Starts:
    """`failures` starts fail first; while `may_start` is not set they hang."""

    def __init__(self) -> None:
        self.attempts = 0
        self.failures = 0
        self.cancelled = 0
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.links: list[FakeLink] = []

    async def start(self) -> EngineLink:
        self.attempts += 1
        try:
            await self.may_start.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no room")
        self.links.append(FakeLink(len(self.links) + 1))
        return cast(EngineLink, self.links[-1])


@pytest.fixture
async def starts() -> Starts:
    return Starts()


Make = Callable[..., StandbyEngines]


@pytest.fixture
async def make(starts: Starts) -> AsyncIterator[Make]:
    made = []

    def make(wanted: int = 1, **options: Any) -> StandbyEngines:
        made.append(StandbyEngines(wanted, starts.start, **({"pauses": (0.0,)} | options)))
        return made[-1]

    yield make
    for link in starts.links:
        link.may_end.set()
    for standbys in made:
        await standbys.close()


async def until(check: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not check():  # noqa: ASYNC110 -- one turn of the loop, not a sleep
            await asyncio.sleep(0)

    await asyncio.wait_for(poll(), PATIENCE)


async def rest() -> None:
    """Long enough for whatever would happen by itself."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_nothing_is_started_before_an_engine_serves_and_the_server_is_up(starts: Starts, make: Make) -> None:
    up = asyncio.Event()
    standbys = make(may_begin=up)
    up.set()
    await rest()
    assert starts.attempts == 0
    standbys.fill()
    standbys.fill()
    await until(lambda: standbys.pids == [1])
    other = make(may_begin=asyncio.Event())
    other.fill()
    await rest()
    assert starts.attempts == 1


async def test_as_many_as_wanted_are_started_one_at_a_time(starts: Starts, make: Make) -> None:
    standbys = make(3)
    starts.may_start.clear()
    standbys.fill()
    await rest()
    assert starts.attempts == 1
    starts.may_start.set()
    await until(lambda: standbys.pids == [1, 2, 3])
    await rest()
    assert starts.attempts == 3


async def test_none_wanted_is_none_started(starts: Starts, make: Make) -> None:
    standbys = make(0)
    standbys.fill()
    assert await standbys.take() is None
    await rest()
    assert starts.attempts == 0


async def test_one_that_was_taken_is_replaced_once_it_serves(starts: Starts, make: Make) -> None:
    standbys = make()
    standbys.fill()
    await until(lambda: standbys.pids == [1])
    taken = await standbys.take()
    assert taken is starts.links[0]
    assert not taken.is_lost
    await rest()
    assert (starts.attempts, standbys.pids) == (1, [])
    assert await standbys.take() is None
    standbys.fill()
    await until(lambda: standbys.pids == [2])
    # It is not ours any more: its end is not our business.
    starts.links[0].lose()
    await rest()
    assert standbys.losses == {}
    assert not starts.links[0].ended


@pytest.mark.parametrize("how", ["death", "hang"])
async def test_one_that_is_lost_is_ended_and_replaced(how: str, starts: Starts, make: Make) -> None:
    standbys = make()
    standbys.fill()
    await until(lambda: standbys.pids == [1])
    starts.links[0].may_end.clear()
    starts.links[0].lose(how)
    await rest()
    assert standbys.pids == []
    # Not before its memory is free.
    assert starts.attempts == 1
    starts.links[0].may_end.set()
    await until(lambda: standbys.pids == [2])
    assert starts.links[0].ended
    assert standbys.losses == {how: 1}


async def test_one_that_was_just_lost_is_not_taken(starts: Starts, make: Make) -> None:
    standbys = make(2)
    standbys.fill()
    await until(lambda: standbys.pids == [1, 2])
    starts.links[0].lose()
    assert await standbys.take() is starts.links[1]
    assert await standbys.take() is None
    await until(lambda: starts.links[0].ended)


async def test_a_start_under_way_is_waited_for(starts: Starts, make: Make) -> None:
    standbys = make()
    starts.may_start.clear()
    standbys.fill()
    await until(lambda: starts.attempts == 1)
    taking = asyncio.create_task(standbys.take())
    await rest()
    assert not taking.done()
    starts.may_start.set()
    assert await taking is starts.links[0]


async def test_a_start_that_fails_or_hangs_is_not_waited_for_longer(starts: Starts, make: Make) -> None:
    standbys = make(join_seconds=0.01)
    starts.may_start.clear()
    starts.failures = 1
    standbys.fill()
    await until(lambda: starts.attempts == 1)
    assert await standbys.take() is None
    taking = asyncio.create_task(standbys.take())
    await rest()
    starts.may_start.set()
    assert await taking is None
    standbys.fill()
    await until(lambda: standbys.pids == [1])


async def test_failing_starts_are_repeated_with_longer_pauses(starts: Starts, make: Make) -> None:
    pauses: list[int] = []

    class Pauses(tuple[float, ...]):
        def __getitem__(self, failures: Any) -> Any:
            pauses.append(failures)
            return super().__getitem__(failures)

    starts.failures = 3
    standbys = make(pauses=Pauses((0.0, 0.001, 0.002)))
    standbys.fill()
    await until(lambda: standbys.pids == [1])
    assert pauses == [0, 1, 2, 2]
    starts.links[0].lose()
    await until(lambda: standbys.pids == [2])
    assert pauses[4:] == [0]


async def test_no_start_begins_while_nobody_serves(starts: Starts, make: Make) -> None:
    standbys = make(pauses=(0.01,))
    standbys.fill()
    await rest()
    # The pause before the start is not over: the start must wait for the next engine.
    assert await standbys.take() is None
    await asyncio.sleep(0.03)
    assert starts.attempts == 0
    standbys.fill()
    await until(lambda: standbys.pids == [1])


async def test_closing_ends_those_that_wait_and_the_one_that_is_started(starts: Starts, make: Make) -> None:
    standbys = make(2)
    standbys.fill()
    await until(lambda: standbys.pids == [1, 2])
    starts.links[0].may_end.clear()
    starts.links[0].lose()
    await rest()
    closing = asyncio.create_task(standbys.close())
    await rest()
    assert not closing.done()
    starts.links[0].may_end.set()
    await closing
    assert all(link.ended for link in starts.links)
    other = make()
    starts.may_start.clear()
    other.fill()
    await until(lambda: starts.attempts == 3)
    await other.close()
    assert starts.cancelled == 1


async def test_one_is_made_for_a_planned_change(make: Make, starts: Starts) -> None:
    """From those that stand by, else anew; also where none is wanted."""
    standbys = make(0)
    link = await standbys.make()
    assert link is cast(Any, starts.links[0])
    standbys = make(1)
    standbys.fill()
    await until(lambda: len(starts.links) == 2)
    await until(lambda: bool(standbys.pids))
    assert await standbys.make() is cast(Any, starts.links[1])
    # Its place is filled again.
    await until(lambda: len(starts.links) == 3)
    starts.failures = 1
    with pytest.raises(RuntimeError, match="no room"):
        await make(0).make()
