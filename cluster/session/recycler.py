"""When a session's incarnation should end: what leaks or idles must not live for ever.

Owns: the policy and the reasons. Pure: it gets numbers and returns orders; the keeper and the controller
carry them out. Knows nothing of actors, journals or how a hand-over goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class RecycleReason(Enum):
    """Why an incarnation ends. The values are metric labels."""

    IDLE = "idle"
    MAX_AGE = "max_age"
    MAX_TURNS = "max_turns"
    MAX_STEPS = "max_steps"
    MEMORY_PRESSURE = "memory_pressure"
    LEAK = "leak"
    MIGRATING = "migrating"
    REQUESTED = "requested"
    UNRESPONSIVE = "unresponsive"
    SHUTDOWN = "shutdown"

    @property
    def deactivates(self) -> bool:
        """Whether the session is left to its journal, without a successor; the others are succeeded at
        once."""
        return self in (RecycleReason.IDLE, RecycleReason.SHUTDOWN)


@dataclass(frozen=True)
class RecyclePolicy:
    """Limits of one incarnation; None: no limit. Seconds and bytes.

    `max_private_growth` is growth of the process's private memory since it took the session.
    """

    max_age: float | None = None
    max_turns: int | None = None
    max_private_growth: int | None = None
    idle_timeout: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_age", "max_turns", "max_private_growth", "idle_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: above 0 is expected, or none for no limit")


@dataclass(frozen=True)
class SessionSnapshot:
    """What the policy looks at. Times are on the clock of `decide`'s `now`, seconds; memory in bytes.

    `activated_at` and `turns` count for this incarnation; `last_used` is when its last turn began or ended.
    `in_turn`: a turn is under way; it can be recycled (the hand-over waits for the turn's end), but is not
    idle.
    """

    digest: str
    activated_at: float
    last_used: float
    turns: int
    in_turn: bool = False
    private_nbytes: int | None = 0
    private_baseline: int = 0


@dataclass(frozen=True)
class RecycleOrder:
    """End this session's incarnation, for this reason."""

    digest: str
    reason: RecycleReason


def decide(
    snapshots: Iterable[SessionSnapshot], policy: RecyclePolicy, now: float, max_per_round: int
) -> list[RecycleOrder]:
    """The incarnations to end in this round, most pressing first, at most `max_per_round`.

    A session gets one order, for the first reason that holds of LEAK, IDLE, MAX_AGE, MAX_TURNS: a leak is
    reported as such, and an idle session is put away, not renewed. Among equals, the longest beyond its limit
    goes first, so that nobody is passed over for ever. Sessions between turns come before those whose turn
    must be waited for.
    """
    found: list[tuple[bool, int, float, str, RecycleReason]] = []
    for snapshot in snapshots:
        verdict = _judge(snapshot, policy, now)
        if verdict is not None:
            reason, excess = verdict
            found.append((snapshot.in_turn, _ORDER.index(reason), -excess, snapshot.digest, reason))
    found.sort(key=lambda entry: entry[:4])
    return [RecycleOrder(digest, reason) for *_, digest, reason in found[: max(max_per_round, 0)]]


def sleepers(
    snapshots: Iterable[SessionSnapshot], hibernate_after: float | None, now: float, max_per_round: int
) -> list[str]:
    """Digests of the sessions to hibernate in this round, longest idle first, at most `max_per_round`."""
    if hibernate_after is None:
        return []
    idle = [(now - s.last_used, s.digest) for s in snapshots if not s.in_turn]
    return [digest for seconds, digest in sorted(idle, reverse=True) if seconds >= hibernate_after][:max_per_round]


_ORDER = (RecycleReason.LEAK, RecycleReason.IDLE, RecycleReason.MAX_AGE, RecycleReason.MAX_TURNS)


def _judge(snapshot: SessionSnapshot, policy: RecyclePolicy, now: float) -> tuple[RecycleReason, float] | None:
    """The reason, and how far beyond its limit the session is (1 is at the limit)."""
    if snapshot.private_nbytes is None:
        return None
    idle = 0.0 if snapshot.in_turn else now - snapshot.last_used
    measures = (
        (RecycleReason.LEAK, snapshot.private_nbytes - snapshot.private_baseline, policy.max_private_growth),
        (RecycleReason.IDLE, idle, policy.idle_timeout),
        (RecycleReason.MAX_AGE, now - snapshot.activated_at, policy.max_age),
        (RecycleReason.MAX_TURNS, snapshot.turns, policy.max_turns),
    )
    for reason, value, limit in measures:
        if limit is not None and value >= limit:
            return reason, value / limit
    return None
