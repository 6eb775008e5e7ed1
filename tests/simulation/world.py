"""A node and its clients in one seed: processes, their deaths and restarts, and the course of a run.

Owns: the wiring, and killing. Knows nothing of what must hold (watch.py, checks.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, cast
from unittest import mock

from ray.exceptions import ActorUnavailableError, RayError

from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import ProcessId, TurnGrant
from phi_cluster.cluster.session.actor_pool import ANSWER_SECONDS
from phi_cluster.cluster.session.keeper import NodeSessions
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.reports import KeeperReport
from phi_cluster.cluster.session.segment import SegmentLayout
from phi_cluster.cluster.session.session import SessionSettings
from phi_cluster.cluster.turn_api import TurnRequest
from phi_cluster.model.kv_layout import KVCacheLayout
from tests.simulation.checks import check
from tests.simulation.client import Administrator, Conversation
from tests.simulation.faults import Faults
from tests.simulation.loop import Loop, Process, Violation
from tests.simulation.network import ActorHandle, Call, Network
from tests.simulation.parts import Parts
from tests.simulation.replica import Replica
from tests.simulation.storage import FINGERPRINT, Disk, Journals, Segments
from tests.simulation.watch import Watch

# No real process has them.
_FIRST_PID = 5_000_000
# A row fills a page, in two regions.
_LAYOUT = SegmentLayout(KVCacheLayout(num_layers=1, num_kv_heads=1, head_dim=1024, max_model_len=512, itemsize=4))
_QUIET_SECONDS = 120
# Wall time.
_BEGINNING = 1_800_000_000.0


class Actors:
    """A node's session actors (in the place of RayActors)."""

    def __init__(self, world: World):
        self._world = world

    def create(self) -> ActorHandle:
        handle = ActorHandle(self._world.network, self._process())
        self._world.actors[f"actor-{handle.process_.identity.pid}"] = handle
        self._restart_at_death(handle)
        return handle

    def names(self) -> list[str]:
        return list(self._world.actors)

    def find(self, name: str) -> ActorHandle:
        if name not in self._world.actors:
            raise ValueError(f"no actor {name}")
        return self._world.actors[name]

    async def kill_for_sure(self, identity: ProcessId) -> None:
        self._world.kill(self._world.processes[identity.pid])

    def kill(self, handle: ActorHandle) -> None:
        if self._caller_lives():
            self._world.actors = {name: other for name, other in self._world.actors.items() if other is not handle}
            self._world.kill_later(handle.process_, 0.005)

    async def restart(self, handle: ActorHandle, identity: ProcessId) -> ProcessId:
        if self._caller_lives():
            self._world.kill_later(self._world.processes[identity.pid], 0.005)
        for _ in range(10_000):
            await asyncio.sleep(0.05)
            found = handle.process_
            if found.identity != identity and found.up_at <= self._world.loop.now:
                return found.identity
        raise ActorUnavailableError("it does not come up", None)

    def _caller_lives(self) -> bool:
        return self._world.loop.current is None or self._world.loop.current.alive

    def _process(self) -> Process:
        world = self._world
        process = world.add_process("actor", up_in=world.rng.choice((0.05, 0.3, 1.0)))
        journals = Journals(world.disk, process, world.parts.journal)
        process.instance = world.parts.host(world.settings, journals.open, process.identity)
        return process

    def _restart_at_death(self, handle: ActorHandle) -> None:
        """As Ray does: at once, and whoever has the handle calls the new process."""

        def restart() -> None:
            if handle in self._world.actors.values():
                handle.process_ = self._process()
                self._restart_at_death(handle)

        handle.process_.at_death.append(restart)


class Poison:
    """Of the node (in the place of PoisonList)."""

    def __init__(self) -> None:
        self.added: list[Any] = []

    def holds(self, request: TurnRequest) -> bool:
        return self._asked(request) in self.added

    def add(self, request: TurnRequest) -> None:
        self.added.append(self._asked(request))

    @staticmethod
    def _asked(request: TurnRequest) -> Any:
        return request.tenant, request.messages, request.sampling


class World:
    def __init__(self, seed: int, parts: Parts | None = None, *, verbose: bool = False):
        self.parts = parts or Parts()
        self.rng = rng = Random(seed)
        self._verbose = verbose
        self.events: deque[tuple[Any, ...]] = deque(maxlen=200)
        self.loop = Loop()
        self.faults = Faults(Random(seed * 3 + 1))
        self.network = Network(self.loop, rng, self.faults.fate, self.kill, self._answered, self.log)
        self.disk = Disk(self._clock, self.faults.disk, self.kill)
        self.segments = cast(Any, Segments(self.loop, lambda pid: self.processes.get(pid), self.parts.segment, _LAYOUT))
        # How often each session was cleared or deleted, or may have been.
        self.resets: Counter[str] = Counter()
        self.watch = Watch(self.loop.fail, self.resets)
        self.layout = _LAYOUT
        self.settings = SessionSettings(
            _LAYOUT,
            FINGERPRINT,
            self._clock,
            self._is_alive,
            poll_seconds=0.2,
            segments=self.segments,
            hold=self.segments.hold,
        )
        self.processes: dict[int, Process] = {}
        # Session actors by name, but those that were killed for good.
        self.actors: dict[str, ActorHandle] = {}
        self.poison = Poison()
        self._handles: dict[Process, ActorHandle] = {}
        self.task_errors = (PhiError, RayError)
        self.num_standbys = rng.choice((0, 0, 1))
        self.max_turns = 50
        self.lease_tokens = rng.choice((3, 6, 50))
        self.bold_deed = rng.choice(("get", "clear", "delete"))
        self._sessions = SessionsConfig(
            max_actors=rng.choice((0, 1, 3, 8)),
            warm_actors=rng.choice((0, 1)),
            spawn_interval=rng.choice((0.1, 0.3, 1.0)),
            turn_wait=3.0,
            max_ephemeral=rng.choice((0, 1, 4)),
        )
        self._kv = KVConfig(reserve_wait=2.0)
        tokens = rng.choice((0, 0, 40, 70, 120))
        self.budget = _LAYOUT.nbytes_used(tokens) if tokens else 2**40
        self._hibernates = rng.random() < 0.8
        self.keeper: Process
        self._start_keeper()
        self.replicas: list[Replica] = []
        self._num_replicas = rng.choice((1, 2))

    # The course of a run.

    def run(self) -> None:
        """Raises Violation."""
        with _reproducible(self.rng):
            self.loop.run(self._main())

    async def _main(self) -> None:
        rng = Random(self.rng.randrange(1 << 60))
        for slot in range(self._num_replicas):
            self._start_replica(slot)
        for when, kind in self.faults.kills:
            self.loop.at(when, None, self._kill_some, kind)
        for when, kind, seconds in self.faults.stalls:
            self.loop.at(when, None, self._stall_some, kind, seconds)
        conversations = self._conversations(rng)
        self.loop.start(None, self._control())
        tasks = [self.loop.start(None, c.run(rng.choice((1, 2, 2, 3)))) for c in conversations]
        named = [c for c in conversations if not c.key.ephemeral]
        if named and rng.random() < 0.6:
            tasks.append(self.loop.start(None, Administrator(self, rng, named).run(rng.randint(1, 4))))
        await asyncio.gather(*tasks)
        kills = [when for when, _ in self.faults.kills]
        stalls = [when + seconds + ANSWER_SECONDS for when, _, seconds in self.faults.stalls]
        await asyncio.sleep(max(0.0, *kills, *stalls, 0.0))
        self.faults.calm = True
        self.log("calm")
        await self._settle()
        for conversation in rng.sample(conversations, 1):
            asked = await conversation.turn()
            if asked.outcome == "no room" and self.budget < 2**40:
                continue
            if asked.outcome != "finished":
                raise Violation(f"{asked.request_id}: not served although all is well again: {asked.outcome}")
        for _ in range(20):
            await self._settle()
            # The second has what the first was told.
            await self._report()
            await self._report()
            if self._is_quiet():
                break
        check(self)

    def _conversations(self, rng: Random) -> list[Conversation]:
        found = []
        shared = rng.random() < 0.3
        for owner in range(rng.choice((2, 2, 3, 4))):
            name = None if rng.random() < 0.3 else "shared" if shared else f"s{owner}"
            tenant = "one" if shared else rng.choice(("one", "two"))
            found.append(Conversation(self, rng, owner if name != "shared" else 9, tenant, name, name == "shared"))
        return found

    async def _settle(self) -> None:
        """Until nothing is under way. What never ends is found by the checks."""
        for _ in range(_QUIET_SECONDS):
            await asyncio.sleep(1.0)
            if self._is_quiet():
                break
        await asyncio.sleep(2.0)

    def _is_quiet(self) -> bool:
        moving = any(entry.moving.locked() for entry in self.node_sessions()._roster)
        return (
            self.keeper.alive
            and not moving
            and all(
                r.process.alive and r.engines.ready and not r.turns.num_running and not r.directory._background
                for r in self.replicas
            )
        )

    async def _control(self) -> None:
        """The controller."""
        while True:
            await asyncio.sleep(4.0)
            with suppress(RayError):
                await self._report()

    async def _report(self) -> KeeperReport:
        return await self.handle(self.keeper).report.remote()

    # Processes.

    def add_process(self, kind: str, up_in: float = 0.0) -> Process:
        process = Process(kind, _FIRST_PID + len(self.processes), self.loop.now + up_in)
        self.processes[process.identity.pid] = process
        self.log("starts", process)
        return process

    def handle(self, process: Process) -> ActorHandle:
        if process not in self._handles:
            self._handles[process] = ActorHandle(self.network, process)
        return self._handles[process]

    def keeper_finder(self) -> KeeperFinder:
        return KeeperFinder(lambda name: self.handle(self.keeper), ["keeper"])

    def kill(self, process: Process) -> None:
        """At once, wherever it is."""
        if not process.alive:
            return
        process.alive = False
        self.log("dies", process)
        for segment in list(process.fds.values()):
            segment.lose()
        process.fds.clear()
        self.network.died(process)
        before, self.loop.current = self.loop.current, None
        for tell in process.at_death:
            tell()
        self.loop.current = before
        if process is self.keeper:
            self.loop.at(self.loop.now + self.rng.choice((0.1, 0.5, 2.0)), None, self._start_keeper)
        for slot, replica in enumerate(self.replicas):
            if replica.process is process:
                self.loop.at(self.loop.now + self.rng.choice((0.3, 1.0)), None, self._start_replica, slot)

    def kill_later(self, process: Process, late: float) -> None:
        self.loop.at(self.loop.now + late, None, self.kill, process)

    def _start_keeper(self) -> None:
        self.keeper = process = self.add_process("keeper", up_in=0.1)
        journals = Journals(self.disk, process, self.parts.journal)
        actors = cast(Any, Actors(self))
        store = self.parts.store(self.disk, process) if self._hibernates else None
        process.instance = self.parts.keeper(
            self.settings, journals, actors, "node", self._sessions, self._kv, self.budget, store, Path("/nonexistent")
        )

    def _start_replica(self, slot: int) -> None:
        process = self.add_process("replica")
        before, self.loop.current = self.loop.current, process
        try:
            self.replicas[slot : slot + 1] = [Replica(self, process)]
        finally:
            self.loop.current = before

    def _kill_some(self, kind: str) -> None:
        living = [p for p in self.processes.values() if p.kind == kind and p.alive]
        if living:
            self.faults.counts[f"kill {kind}"] += 1
            self.kill(self.rng.choice(living))

    def _stall_some(self, kind: str, seconds: float) -> None:
        living = [p for p in self.processes.values() if p.kind == kind and p.alive]
        if living:
            self.faults.counts[f"stall {kind}"] += 1
            process = self.rng.choice(living)
            self.log("stalls", process, seconds)
            process.stalled_until = self.loop.now + seconds

    def _clock(self) -> float:
        return _BEGINNING + self.loop.now

    def _is_alive(self, identity: ProcessId) -> bool:
        process = self.processes.get(identity.pid)
        return process is not None and process.alive

    # Watching.

    def _answered(self, call: Call, answer: Any) -> None:
        if isinstance(answer, TurnGrant):
            held = call.target.fds.get(answer.segment.fd)
            life = self.disk.lives.get(answer.key.digest, 0)
            self.watch.granted(call.args[0], answer, held and held.memory, life)

    def node_sessions(self) -> NodeSessions:
        return cast(NodeSessions, self.keeper.instance)

    def log(self, *what: Any) -> None:
        self.events.append((self.loop.now, *what))
        if self._verbose:
            print(line(self.events[-1]))


def line(event: tuple[Any, ...]) -> str:
    when, *what = event
    words = (item.__name__ if isinstance(item, type) else str(item) for item in what)
    return f"{when:9.4f}  {' '.join(words)}"


@contextmanager
def _reproducible(rng: Random) -> Iterator[None]:
    """What the product asks of the real machine, and of chance, is answered from the seed."""

    def uuid4() -> Any:
        return mock.Mock(hex=f"{rng.getrandbits(128):032x}")

    logger = logging.getLogger("phi_cluster")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with (
            mock.patch("uuid.uuid4", uuid4),
            mock.patch("phi_cluster.cluster.session.keeper_reporter.private_bytes", return_value=0),
        ):
            yield
    finally:
        logger.setLevel(level)
