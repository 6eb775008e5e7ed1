"""Whether a session's memory is worth moving to another node, and where those of a node that is given up go.

Owns: the measured speed of moves, the comparison with computing, and the plan of an evacuation. Pure. Knows nothing of
networks, sessions or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Before anything was measured: a link of 1 Gbit/s.
_BYTES_PER_SECOND = 100e6
# Asking, checking and letting go, whatever the size.
MOVE_SECONDS = 0.03
# What is measured counts so much, what was known before the rest.
_WEIGHT = 0.3
# A move of fewer bytes says nothing of the link.
_MIN_NBYTES = 8 * 2**20


def is_worth_moving(num_tokens: int, nbytes: int, bytes_per_second: float, tokens_per_second: float) -> bool:
    """Whether keys and values of so many tokens, so many bytes, are there sooner if they are moved than if they are
    computed. Both speeds are in a keeper's report."""
    return MOVE_SECONDS + nbytes / bytes_per_second < num_tokens / tokens_per_second


class MoveSpeed:
    """Bytes a second with which sessions come to a node; adapts to what is told."""

    def __init__(self) -> None:
        self.bytes_per_second = _BYTES_PER_SECOND

    def moved(self, nbytes: int, seconds: float) -> None:
        """So many bytes came in this time."""
        if nbytes >= _MIN_NBYTES and seconds > 0:
            self.bytes_per_second += _WEIGHT * (nbytes / seconds - self.bytes_per_second)


@dataclass(frozen=True)
class Movable:
    """A session between two turns. Bytes and seconds."""

    digest: str
    nbytes: int
    idle_seconds: float
    ephemeral: bool = False


def plan_evacuation(
    sessions: Iterable[Movable], rooms: dict[str, int], max_idle_seconds: float | None
) -> dict[str, str | None]:
    """By digest, in the order in which they go, the node for each; None: it is left to its journal, because nobody has
    used it for so long, or because nobody has room for it. `rooms`: free bytes by node.

    Named sessions come before unnamed ones, which their clients can only find by chance; those that were used last come
    first. Each goes where most room is left then.
    """
    left = dict(rooms)
    plan: dict[str, str | None] = {}
    for one in sorted(sessions, key=lambda one: (one.ephemeral, one.idle_seconds, one.digest)):
        target = max(left, key=lambda node: (left[node], node), default=None)
        is_stale = max_idle_seconds is not None and one.idle_seconds > max_idle_seconds
        if target is None or is_stale or left[target] < one.nbytes:
            plan[one.digest] = None
        else:
            plan[one.digest] = target
            left[target] -= one.nbytes
    return plan
