"""A simulated replica process: the product's turns, directory and engine client, and connections of clients.

Owns: what of replica.py and the HTTP edge a turn needs. Knows nothing of faults or of what clients ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phi_cluster.cluster.engine_link import EngineLink
from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.standby import StandbyEngines
from phi_cluster.cluster.turn import TurnLimits
from phi_cluster.cluster.turn_api import TurnRequest
from tests.simulation.engine import Engine, Link
from tests.simulation.language import Tokenizer
from tests.simulation.loop import Process
from tests.simulation.network import Channel

if TYPE_CHECKING:
    from tests.simulation.world import World

TURN_WAIT = 4.0
READY_WAIT = 8.0


@contextmanager
def _never(process: ProcessId) -> Iterator[asyncio.Future[None]]:
    """The network tells whose process has ended."""
    yield asyncio.get_running_loop().create_future()


class Replica:
    def __init__(self, world: World, process: Process):
        """In the process."""
        self.process = process
        self._world = world
        parts = world.parts
        self.directory = parts.directory(world.keeper_finder(), Path("/nonexistent"), end_of=_never)
        self._standbys = StandbyEngines(world.num_standbys, self._start_engine, pauses=(0.3, 1.0), join_seconds=1.0)
        self.engines = parts.engine_client(self._start_engine, self._standbys, ready_wait=READY_WAIT)
        limits = TurnLimits(world.layout.max_model_len, world.max_turns, TURN_WAIT, world.lease_tokens)
        tokenizer = cast(Any, Tokenizer())
        self.turns = parts.turns(tokenizer, self.directory, self.engines, limits, process.identity, world.poison)
        self.engines.start()

    async def _start_engine(self) -> EngineLink:
        world = self._world
        await asyncio.sleep(world.rng.choice((0.05, 0.2, 0.6)))
        process = world.add_process("engine")
        engine = world.parts.engine(
            world.loop,
            world.network,
            world.rng,
            process,
            world.segments,
            world.layout,
            world.watch.added,
            world.watch.writes,
        )
        # It reads the end of its socket, between two steps.
        late = world.rng.choice((0.0, 0.01, 0.5))
        self.process.at_death.append(lambda: world.kill_later(process, late))
        return cast(
            EngineLink, Link(world.loop, world.network, cast(Engine, engine), process, self.process, world.kill)
        )


class Reset:
    """The connection broke."""


class Left:
    """The client's own wish."""


class Connection:
    """One request of a client. What comes of it is in `events`: TurnEvents, an error, a Reset or a Left."""

    def __init__(self, world: World, replica: Replica, request: TurnRequest):
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self._world = world
        self._replica = replica
        self._request = request
        self._task: asyncio.Task[None] | None = None
        self._is_cut = False
        self._down = Channel(world.loop, world.network, None, self.events.put_nowait)
        if replica.process.alive:
            replica.process.at_death.append(lambda: self._down.send(Reset()))
            world.loop.at(world.loop.now + world.network.delay(), replica.process, self._start)
        else:
            self._down.send(Reset())

    def leave(self) -> None:
        """The replica hears of it after a while."""
        self._world.loop.at(self._world.loop.now + self._world.network.delay(), self._replica.process, self._cut)

    def _start(self) -> None:
        if not self._is_cut:
            self._task = asyncio.get_running_loop().create_task(self._serve())

    def _cut(self) -> None:
        self._is_cut = True
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        rng = self._world.rng
        try:
            async with aclosing(self._replica.turns.run(self._request)) as events:
                async for event in events:
                    self._down.send(event)
                    if rng.random() < 0.1:
                        # A slow client: it may leave while the turn stands at a yield.
                        await asyncio.sleep(0.02)
        except PhiError as error:
            self._down.send(error)
        except Exception as error:
            self._world.log("unexpected", repr(error))
            self._down.send(error)
