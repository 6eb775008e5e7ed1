"""What of a node's memory is needed, and what each of its replicas tells of it."""

from __future__ import annotations

from phi_cluster.cluster.kv_load import NEEDED_SECONDS, KVLoad, KVLoads
from phi_cluster.cluster.messages import ProcessId, SessionKey
from phi_cluster.cluster.session.reports import KeeperReport, SessionReport
from phi_cluster.cluster.session.session import SessionStats


def session(name: str, nbytes: int, idle: float, in_turn: bool = False) -> SessionReport:
    stats = SessionStats(SessionKey("alice", name, False), "held", in_turn, 0, 9, 9, nbytes, 1, 9.0, idle, 1, 0, 1, 9.0)
    return SessionReport(stats, None, 0, 0)


def report(node_id: str, *sessions: SessionReport) -> KeeperReport:
    return KeeperReport(node_id, ProcessId(7, 7), 1000, 900, list(sessions), 0, 0, 0, 0, 0, {}, 0, {})


def test_who_idles_needs_nothing() -> None:
    loads = KVLoads()
    loads.take(
        report(
            "a",
            session("used", 300, 1.0),
            session("idle", 500, NEEDED_SECONDS),
            session("long turn", 40, NEEDED_SECONDS, in_turn=True),
        )
    )
    assert loads.share("a", 1) == KVLoad(340, 1000)


def test_the_replicas_of_a_node_tell_of_it_once() -> None:
    loads = KVLoads()
    loads.take(report("a", session("x", 300, 1.0)))
    loads.take(report("b", session("y", 100, 1.0)))
    assert loads.share("a", 2) == KVLoad(150, 500)
    assert loads.share("b", 1) == KVLoad(100, 1000)
    # A replica asks before it has been counted.
    assert loads.share("b", 0) == KVLoad(100, 1000)


def test_the_last_report_counts_and_a_lost_node_is_forgotten() -> None:
    loads = KVLoads()
    loads.take(report("a", session("x", 300, 1.0)))
    loads.take(report("a"))
    assert loads.share("a", 1) == KVLoad(0, 1000)
    loads.forget("a")
    loads.forget("never there")
    assert loads.share("a", 1) == KVLoad(0, 0)
