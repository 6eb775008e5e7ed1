"""How many replicas the load wants.

Owns: the policy, and its form as one of Serve's own (a class by path, called with Serve's context about four times a
second; Serve keeps the delays, which are the hysteresis in time). Pure: numbers in, a number out. Knows nothing of how
replicas are started and drained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

# So full may the rest be after one replica left; closer to 1 the number would swing about a steady load.
_SHRINK_SHARE = 0.8


@dataclass(frozen=True)
class ReplicaLoad:
    """`open_turns`: running and waiting ones. `oldest_wait`: seconds for which the first of those that wait has done
    so; 0 if none does. `num_background`: responses that are made in the background, running or not. `kv_needed`,
    `kv_budget`: the replica's share of its node's memory for keys and values, in bytes (kv_load.py)."""

    open_turns: float
    oldest_wait: float
    num_background: float = 0.0
    kv_needed: float = 0.0
    kv_budget: float = 0.0


class TurnLoads(Protocol):
    """What a replica tells about its turns."""

    @property
    def num_open(self) -> int: ...

    def oldest_wait(self) -> float: ...


@dataclass(frozen=True)
class ScalingPolicy:
    """`target_turns`: open turns that a replica is to have; `max_wait`: seconds that a turn may wait for its first
    token before there is one replica more; `kv_target`: share of the memory for keys and values that is to be needed at
    most, where a replica more brings more of it, which is where it brings another machine (None: it does not)."""

    target_turns: float
    max_wait: float
    kv_target: float | None = None

    def num_replicas(self, loads: Sequence[ReplicaLoad], target: int, num_queued: float = 0.0) -> int:
        """`loads` are of the replicas that run, `target` is how many there are to be by now: of those that are still
        to come it is expected that they take their share. `num_queued`: requests that no replica has. 0 if nothing is
        to be done."""
        num_open = sum(load.open_turns for load in loads) + num_queued
        wanted = max(
            _enough(num_open, self.target_turns, target), self._for_memory(loads, target), self._at_least(loads)
        )
        if any(load.oldest_wait > self.max_wait for load in loads):
            wanted = max(wanted, len(loads) + 1)
        return wanted

    def _for_memory(self, loads: Sequence[ReplicaLoad], target: int) -> int:
        budgets = [load.kv_budget for load in loads if load.kv_budget]
        if self.kv_target is None or not budgets:
            return 0
        each = self.kv_target * sum(budgets) / len(budgets)
        # Sessions that nobody has a turn of sleep well without a replica.
        return min(_enough(sum(load.kv_needed for load in loads), each, target), len(loads) + 1)

    @staticmethod
    def _at_least(loads: Sequence[ReplicaLoad]) -> int:
        return int(any(load.num_background for load in loads))


def _enough(amount: float, each: float, target: int) -> int:
    """Replicas for an amount of which each takes so much; fewer than `target` only if they have it easily."""
    wanted = math.ceil(amount / each)
    if wanted < target:
        wanted = min(target, math.ceil(amount / (each * _SHRINK_SHARE)))
    return wanted


def scaling_metrics(turns: TurnLoads, num_background: int, kv: tuple[float, float]) -> dict[str, float]:
    """What a replica gives to Serve for the policy, under the names of ReplicaLoad. `kv`: needed and budget."""
    load = ReplicaLoad(float(turns.num_open), turns.oldest_wait(), float(num_background), *kv)
    return asdict(load)


class LoadScaling:
    """The policy as Serve calls it. The arguments are ScalingPolicy's."""

    def __init__(self, target_turns: float, max_wait: float, kv_target: float | None = None):
        self._policy = ScalingPolicy(target_turns, max_wait, kv_target)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context`: Serve's AutoscalingContext. Bounds and delays are applied by Serve to what is returned."""
        loads = _latest_loads(context.raw_metrics or {})
        target = context.target_num_replicas
        wanted = self._policy.num_replicas(loads, target, context.total_queued_requests or 0.0)
        # Of a replica that has not told anything yet it is not known that it has nothing to do, and one that is still
        # to come was wanted by somebody.
        if len(loads) < max(context.current_num_replicas, min(target, 1)):
            return max(target, wanted), {}
        return wanted, {}


def _latest_loads(metrics: Mapping[str, Mapping[Any, Iterable[Any]]]) -> list[ReplicaLoad]:
    """By metric and replica a series of values with their times -> the last ones. Serve's means reach too far back: a
    replica that was full half a minute ago is no reason for another one."""

    def latest(name: str, replica: Any) -> float:
        series = list(metrics.get(name, {}).get(replica, ()))
        return float(series[-1].value) if series else 0.0

    names = [one.name for one in fields(ReplicaLoad)]
    return [ReplicaLoad(*(latest(name, replica) for name in names)) for replica in metrics.get("open_turns", {})]
