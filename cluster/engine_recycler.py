"""When an engine should be renewed: what leaks must not live for ever.

Owns: the policy. Pure: it gets numbers and returns orders; a replica carries them out, between two steps. Knows nothing
of processes or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phi_cluster.cluster.session.recycler import RecycleReason

# A replica that is silent for so long is gone; one that was told to renew its engine has it done in time, or failed.
_SILENCE_SECONDS = 5.0
_ORDER_SECONDS = 60.0


@dataclass(frozen=True)
class EnginePolicy:
    """Limits of one engine; None: no limit. Seconds, steps and bytes. `max_private_growth` is growth of its private
    memory since it had served for a minute."""

    max_age: float | None = None
    max_steps: int | None = None
    max_private_growth: int | None = None


@dataclass(frozen=True)
class EngineReport:
    """What a replica tells of the engine that serves it, since it serves. Of the shared weights, bytes that it has
    mapped, and that it has copied."""

    pid: int
    age_seconds: float
    steps: int
    private_nbytes: int
    private_baseline: int
    weights_mapped: int = 0
    weights_copied: int = 0


def decide(
    engines: Iterable[tuple[str, EngineReport]], policy: EnginePolicy, requested: frozenset[int] = frozenset()
) -> tuple[str, RecycleReason] | None:
    """The replica whose engine is to be renewed now, and why; `requested`: pids of engines somebody wants renewed.

    One at a time: two at once would both want room and processors. A leak goes first, then requests, then whoever is
    the furthest beyond a limit.
    """
    found: list[tuple[int, float, str, RecycleReason]] = []
    for replica_id, engine in engines:
        growth = engine.private_nbytes - engine.private_baseline
        measures = (
            (RecycleReason.LEAK, growth, policy.max_private_growth),
            (RecycleReason.REQUESTED, int(engine.pid in requested), 1),
            (RecycleReason.MAX_AGE, engine.age_seconds, policy.max_age),
            (RecycleReason.MAX_STEPS, engine.steps, policy.max_steps),
        )
        for order, (reason, value, limit) in enumerate(measures):
            if limit is not None and value >= limit:
                found.append((min(order, 2), -value / limit, replica_id, reason))
                break
    return min(found, key=lambda one: one[:3])[2:] if found else None


class EngineRecycles:
    """Which replica may renew its engine when: asked with each replica's report. Moments are the caller's, in seconds
    of one clock."""

    def __init__(self, policy: EnginePolicy):
        self._policy = policy
        self._reports: dict[str, tuple[float, EngineReport]] = {}
        self._requested: frozenset[int] = frozenset()
        # Who was told to, for which engine, and when.
        self._ordered: tuple[str, int, float] | None = None

    def request_all(self, now: float) -> int:
        """All engines that are known are wanted new; returns how many."""
        pids = {engine.pid for _, engine in self._living(now)}
        self._requested |= pids
        return len(pids)

    def take(self, replica_id: str, engine: EngineReport | None, now: float) -> RecycleReason | None:
        """The replica's engine is this one now: why it is to be renewed, if it is."""
        if engine is None:
            self._reports.pop(replica_id, None)
            return None
        self._reports[replica_id] = (now, engine)
        living = self._living(now)
        self._requested &= {one.pid for _, one in living}
        if self._ordered is not None:
            ordered_id, pid, at = self._ordered
            is_under_way = (ordered_id, pid) in {(name, one.pid) for name, one in living}
            if is_under_way and now - at < _ORDER_SECONDS:
                return None
            self._ordered = None
        found = decide(living, self._policy, self._requested)
        if found is None or found[0] != replica_id:
            return None
        self._ordered = (replica_id, engine.pid, now)
        return found[1]

    def _living(self, now: float) -> list[tuple[str, EngineReport]]:
        self._reports = {name: (at, one) for name, (at, one) in self._reports.items() if now - at < _SILENCE_SECONDS}
        return [(name, one) for name, (_, one) in self._reports.items()]
