"""How many replicas the load wants.

Owns: the policy, and its form as one of Serve's own (a class by path, called with Serve's context about ten times a
second; Serve keeps the delays, which are the hysteresis in time). Pure: numbers in, a number out. Knows nothing of how
replicas are started and drained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# So full may the rest be after one replica left; closer to 1 the number would swing about a steady load.
_SHRINK_SHARE = 0.8


@dataclass(frozen=True)
class ReplicaLoad:
    """`open_turns`: running and waiting ones. `oldest_wait`: seconds for which the first of those that wait has done
    so; 0 if none does."""

    open_turns: float
    oldest_wait: float


class TurnLoads(Protocol):
    """What a replica tells about itself; the names are those of Serve's custom metrics."""

    @property
    def num_open(self) -> int: ...

    def oldest_wait(self) -> float: ...


@dataclass(frozen=True)
class ScalingPolicy:
    """`target_turns`: open turns that a replica is to have; `max_wait`: seconds that a turn may wait for its first
    token before there is one replica more."""

    target_turns: float
    max_wait: float

    def num_replicas(self, loads: Sequence[ReplicaLoad], target: int) -> int:
        """At least 1. `loads` are of the replicas that run, `target` is how many there are to be by now: of those that
        are still to come it is expected that they take their share."""
        num_open = sum(load.open_turns for load in loads)
        wanted = math.ceil(num_open / self.target_turns)
        if wanted < target:
            wanted = min(target, math.ceil(num_open / (self.target_turns * _SHRINK_SHARE)))
        if any(load.oldest_wait > self.max_wait for load in loads):
            wanted = max(wanted, len(loads) + 1)
        return max(wanted, 1)


def scaling_metrics(turns: TurnLoads) -> dict[str, float]:
    """What a replica gives to Serve for the policy."""
    return {"open_turns": float(turns.num_open), "oldest_wait": turns.oldest_wait()}


class LoadScaling:
    """The policy as Serve calls it. The arguments are ScalingPolicy's."""

    def __init__(self, target_turns: float, max_wait: float):
        self._policy = ScalingPolicy(target_turns, max_wait)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context`: Serve's AutoscalingContext. Bounds and delays are applied by Serve to what is returned."""
        loads = _latest_loads(context.raw_metrics or {})
        target = context.target_num_replicas
        # Of a replica that has not told anything yet it is not known that it has nothing to do.
        if len(loads) < context.current_num_replicas:
            return max(target, self._policy.num_replicas(loads, target)), {}
        return self._policy.num_replicas(loads, target), {}


def _latest_loads(metrics: Mapping[str, Mapping[Any, Iterable[Any]]]) -> list[ReplicaLoad]:
    """By metric and replica a series of values with their times -> the last ones. Serve's means reach too far back: a
    replica that was full half a minute ago is no reason for another one."""

    def latest(name: str, replica: Any) -> float:
        series = list(metrics.get(name, {}).get(replica, ()))
        return float(series[-1].value) if series else 0.0

    return [
        ReplicaLoad(latest("open_turns", replica), latest("oldest_wait", replica))
        for replica in metrics.get("open_turns", {})
    ]
