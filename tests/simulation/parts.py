"""The product's classes that a world is built of: each can be replaced by one with a planted bug.

Owns: the list. Knows nothing of the world.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi_cluster.cluster.engine_client import EngineClient
from phi_cluster.cluster.session.actor import SessionHost
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.keeper import NodeSessions
from phi_cluster.cluster.turn import Turns
from tests.simulation.engine import Engine
from tests.simulation.storage import DurableJournal, HibernationDisk, SimulatedSegment


@dataclass(frozen=True)
class Parts:
    turns: type[Turns] = Turns
    directory: type[SessionDirectory] = SessionDirectory
    engine_client: type[EngineClient] = EngineClient
    keeper: type[NodeSessions] = NodeSessions
    host: type[SessionHost] = SessionHost
    journal: type[DurableJournal] = DurableJournal
    segment: type[SimulatedSegment] = SimulatedSegment
    engine: type[Engine] = Engine
    store: type[HibernationDisk] = HibernationDisk
