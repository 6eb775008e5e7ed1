"""What a replica tells the controller, and what it does by the answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayActorError

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.engine_health import EngineHealth
from phi_cluster.cluster.events import EventKind, EventLog
from phi_cluster.cluster.frames import NO_TOTALS, StepFrame
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.peers import PeerTable, ReplicaOrders
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.replica_report import ReplicaReport
from phi_cluster.cluster.replica_reporter import ReplicaReporter
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.monitoring.replica_metrics import ReplicaMetrics


class Handle:
    """An engine."""

    def __init__(self, process: ProcessId):
        self.process = process


class Engines:
    """Of EngineClient and StandbyEngines, what is told and done."""

    def __init__(self) -> None:
        self.ready = True
        self.engine: Handle | None = Handle(process_id())
        self.replacements = 0
        self.serving_since = 0.0
        self.last_step = StepFrame(7, [], 3, 2, queue_seconds=0.5)
        self.totals = NO_TOTALS
        self.recoveries: Counter[str] = Counter()
        self.recycles: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.pids: list[int] = []
        self.renewed: list[str] = []
        self.may_renew = asyncio.Event()

    async def recycle(self, reason: str) -> bool:
        self.renewed.append(reason)
        await self.may_renew.wait()
        raise RuntimeError("the successor did not start")


class Turns:
    num_open = 4


class Controller:
    """An actor: `report_replica.remote(report)` answers with `orders`."""

    def __init__(self) -> None:
        self.orders = ReplicaOrders(None, "head")
        self.is_gone = False
        self.report_replica = self
        self._reports: asyncio.Queue[ReplicaReport] = asyncio.Queue()

    async def remote(self, report: ReplicaReport) -> ReplicaOrders:
        if self.is_gone:
            raise RayActorError
        self._reports.put_nowait(report)
        return self.orders

    async def next(self) -> ReplicaReport:
        """All reports in turn."""
        return await asyncio.wait_for(self._reports.get(), 10)


class Found:
    """Finds the controller there is; `times`: how often it was looked for."""

    def __init__(self, controller: Controller | None):
        self.controller = controller
        self.times = 0

    def __call__(self) -> Any:
        self.times += 1
        if self.controller is None:
            raise ValueError("no such actor")
        return self.controller


@asynccontextmanager
async def reporting(
    found: Found, engines: Any, events: EventLog | None = None, addresses: list[str] | None = None
) -> AsyncIterator[ReplicaReporter]:
    turns = Turns()
    listening = iter(addresses or [])
    reporter = ReplicaReporter(
        "me",
        "here",
        Config(),
        ReplicaMetrics([RecycleReason.MAX_AGE.value, RecycleReason.REQUESTED.value]),
        events or EventLog(lambda: 0.0),
        engines,
        engines,
        EngineHealth(engines, asyncio.Event()),
        turns,
        PeerTable("here", lambda: turns.num_open, capacity=1),
        controller=found,
        find_address=lambda: next(listening, ""),
        num_forwarded=lambda: 1,
        round_seconds=0.001,
    )
    running = asyncio.create_task(reporter.run())
    try:
        yield reporter
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_report_says_what_the_replica_and_its_engine_do() -> None:
    controller, engines = Controller(), Engines()
    async with reporting(Found(controller), engines) as reporter:
        report = await controller.next()
        await asyncio.wait_for(reporter.told.wait(), 10)
    assert (report.replica_id, report.node_id, report.num_open_turns, report.queue_seconds) == ("me", "here", 4, 0.5)
    assert report.engine is not None
    assert (report.engine.pid, report.engine.steps) == (process_id().pid, 7)
    assert report.engine.private_nbytes == report.engine.private_baseline > 0


async def test_without_an_engine_there_is_a_report_too() -> None:
    controller, engines = Controller(), Engines()
    engines.engine = None
    async with reporting(Found(controller), engines):
        assert (await controller.next()).engine is None


async def test_events_are_told_once_and_again_to_a_new_controller() -> None:
    events, found = EventLog(lambda: 0.0), Found(first := Controller())
    events.add(EventKind.REPLICA_STARTED)
    async with reporting(found, Engines(), events):
        assert [event.kind for event in (await first.next()).events] == [EventKind.REPLICA_STARTED]
        assert (await first.next()).events == []
        events.add(EventKind.ENGINE_STARTED)
        while not (later := (await first.next()).events):
            pass
        assert [event.kind for event in later] == [EventKind.ENGINE_STARTED]
        assert found.times == 1
        found.controller, first.is_gone = None, True
        while found.times < 3:  # noqa: ASYNC110 -- for a moment, once
            await asyncio.sleep(0.001)
        found.controller = second = Controller()
        told = [event.kind for event in (await second.next()).events]
        assert told == [EventKind.REPLICA_STARTED, EventKind.ENGINE_STARTED]


async def test_an_engine_is_renewed_once_at_a_time_and_a_failure_is_no_end() -> None:
    controller, engines = Controller(), Engines()
    controller.orders = ReplicaOrders(RecycleReason.MAX_AGE, "head")
    async with reporting(Found(controller), engines):
        for _ in range(4):
            await controller.next()
        assert engines.renewed == ["max_age"]
        engines.may_renew.set()
        while len(engines.renewed) < 2:
            await controller.next()


async def test_the_address_is_asked_for_until_it_is_known() -> None:
    controller, engines = Controller(), Engines()
    async with reporting(Found(controller), engines, addresses=["", "127.0.0.1:7"]):
        assert (await controller.next()).address == ""
        assert (await controller.next()).address == "127.0.0.1:7"
        assert (await controller.next()).address == "127.0.0.1:7"
