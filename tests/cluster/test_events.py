"""Events: told one by one or folded, collected once, numbered, and named to whom they concern."""

import asyncio
import pickle

import pytest

from phi_cluster.cluster.event_ring import EventRing
from phi_cluster.cluster.events import Event, EventKind, EventLog
from phi_cluster.cluster.messages import SessionKey

MINE, THEIRS = SessionKey("mine", "a"), SessionKey("theirs", "b")


class Clock:
    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> EventLog:
    return EventLog(clock, capacity=8)


@pytest.fixture
def ring(clock: Clock) -> EventRing:
    return EventRing(clock, capacity=10)


def test_a_log_gives_what_is_new(log: EventLog) -> None:
    log.add(EventKind.ENGINE_DIED, reason="death")
    log.add(EventKind.ENGINE_TOOK_OVER, seconds=0.0921)
    first, second = log.after(0)
    assert (first.number, first.text) == (1, "an engine was lost (death)")
    assert second.text == "an engine took over after 0.092 s"
    assert log.after(1) == [second]
    assert log.after(2) == []
    assert pickle.loads(pickle.dumps(second)) == second


def test_a_storm_is_folded_and_the_calm_after_it_is_not(log: EventLog, clock: Clock) -> None:
    for _ in range(30):
        log.add(EventKind.SESSION_ACTIVATED, MINE)
    log.add(EventKind.ENGINE_STARTED)
    told = log.after(0)
    assert [event.count for event in told] == [1, 1, 1, 1, 1, 26]
    assert told[-1].text == "a session got an actor of its own, 26 more within a second"
    assert told[-1].key is None
    # More of the same second, after it was collected.
    log.add(EventKind.SESSION_ACTIVATED, MINE)
    log.add(EventKind.SESSION_ACTIVATED, MINE)
    assert [event.count for event in log.after(told[-1].number)] == [2]
    clock.now += 1
    log.add(EventKind.SESSION_ACTIVATED, MINE)
    assert log.after(7)[-1].key == MINE


def test_what_was_folded_is_told_in_the_next_second_too(log: EventLog, clock: Clock) -> None:
    for _ in range(6):
        log.add(EventKind.SESSION_WOKEN, MINE)
    clock.now += 5
    log.add(EventKind.ENGINE_DIED)
    assert [(event.kind, event.count) for event in log.after(4)] == [
        (EventKind.SESSION_WOKEN, 2),
        (EventKind.ENGINE_DIED, 1),
    ]


def test_a_log_is_bounded(log: EventLog, clock: Clock) -> None:
    for _ in range(100):
        log.add(EventKind.SESSION_WOKEN)
        clock.now += 1
    assert [event.number for event in log.after(0)] == list(range(93, 101))


def test_unnamed_conversations_have_no_name(log: EventLog) -> None:
    log.add(EventKind.MEMORY_GIVEN_WAY, SessionKey("mine", "uuid", ephemeral=True))
    assert log.after(0)[0].key is None


def test_every_kind_has_a_text() -> None:
    for kind in EventKind:
        assert Event(1, 0.0, kind).text


async def test_a_ring_numbers_all_sources_and_takes_nothing_twice(ring: EventRing, log: EventLog) -> None:
    other = EventLog(Clock())
    log.add(EventKind.ENGINE_DIED)
    other.add(EventKind.SESSION_WOKEN, MINE)
    ring.take("replica-1", "n1", log.after(ring.seen("replica-1")))
    ring.take("keeper-1", "n2", other.after(ring.seen("keeper-1")))
    ring.take("replica-1", "n1", log.after(0))
    page = await ring.page(None, 10, None)
    first, second = page.events
    assert (first["number"], second["number"]) == (1_000_001, 1_000_002)
    assert (first["id"], first["node_id"], first["kind"]) == ("replica-1-1", "n1", "engine_died")
    assert (second["tenant"], second["session_id"]) == ("mine", "a")
    assert page.last == 1_000_002
    log.add(EventKind.ENGINE_STARTED)
    ring.take("replica-1", "n1", log.after(ring.seen("replica-1")))
    assert [one["kind"] for one in (await ring.page(page.last, 10, None)).events] == ["engine_started"]


async def test_numbers_go_on_rising_with_a_new_ring_and_ids_stay(ring: EventRing, log: EventLog, clock: Clock) -> None:
    log.add(EventKind.ENGINE_DIED)
    ring.take("replica-1", "n", log.after(0))
    [before] = (await ring.page(None, 10, None)).events
    clock.now += 2
    successor = EventRing(clock)
    successor.take("replica-1", "n", log.after(0))
    [after] = (await successor.page(before["number"], 10, None)).events
    assert after["id"] == before["id"]
    assert after["number"] > before["number"]


async def test_sessions_are_named_to_their_own_tenant(ring: EventRing, log: EventLog) -> None:
    for key in (MINE, THEIRS):
        log.add(EventKind.SESSION_WOKEN, key)
    ring.take("k", "n", log.after(0))
    names = [(one["tenant"], one["session_id"]) for one in (await ring.page(None, 10, "mine")).events]
    assert names == [("mine", "a"), (None, None)]
    assert "b" in [one["session_id"] for one in (await ring.page(None, 10, None)).events]


async def test_pages(ring: EventRing, clock: Clock) -> None:
    log = EventLog(clock)
    for _ in range(15):
        log.add(EventKind.ENGINE_DIED)
        clock.now += 1
    ring.take("r", "n", log.after(0))
    newest = await ring.page(None, 3, None)
    assert [one["id"] for one in newest.events] == ["r-13", "r-14", "r-15"]
    assert not newest.has_more
    # The ring has ten.
    oldest = await ring.page(0, 4, None)
    assert [one["id"] for one in oldest.events] == ["r-6", "r-7", "r-8", "r-9"]
    assert oldest.has_more
    assert (await ring.page(oldest.last, 100, None)).events[0]["id"] == "r-10"
    beyond = await ring.page(newest.last + 50, 4, None)
    assert (beyond.events, beyond.last) == ([], newest.last + 50)


async def test_who_waits_is_told_at_once(ring: EventRing, log: EventLog) -> None:
    waiting = asyncio.ensure_future(ring.page(1_000_000, 10, None, 60.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    log.add(EventKind.ENGINE_DIED)
    ring.take("r", "n", log.after(0))
    assert len((await asyncio.wait_for(waiting, 10)).events) == 1
    assert (await ring.page(1_000_001, 10, None, 0.001)).events == []


async def test_nobody_waits_for_a_cluster_that_ends(ring: EventRing) -> None:
    waiting = asyncio.ensure_future(ring.page(1_000_000, 10, None, 60.0))
    await asyncio.sleep(0)
    ring.close()
    assert (await asyncio.wait_for(waiting, 10)).is_ending
    assert (await ring.page(1_000_000, 10, None, 60.0)).is_ending
