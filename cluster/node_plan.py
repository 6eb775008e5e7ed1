"""What a node has room for, decided once when it starts, from its machine and the configuration.

Owns: the plan. Pure but for what it notes. Knows nothing of Ray, and of how the machine was looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.preflight import Machine, kv_budget, session_actors, standby_engines


@dataclass(frozen=True)
class NodePlan:
    """`budget_nbytes`: of KV caches; `num_standbys`: engines that stand by for each replica; `num_session_actors`: at
    most."""

    budget_nbytes: int
    num_standbys: int
    num_session_actors: int


def plan_node(config: Config, machine: Machine, weights_nbytes: int, noted: Callable[[str], None]) -> NodePlan:
    """`noted` is told what there is less of than could be. Raises StartError if too little fits."""
    budget_nbytes = kv_budget(config, machine, weights_nbytes)
    num_standbys = standby_engines(config, machine, weights_nbytes, budget_nbytes)
    if config.engine.standby_engines is None and not num_standbys and config.device == "cpu":
        noted("no memory is left for a standby engine: should the engine die, streams pause for seconds")
    num_actors = session_actors(config, machine, weights_nbytes, budget_nbytes, num_standbys)
    if num_actors < config.sessions.max_actors:
        noted(
            f"memory is left for {num_actors} session actors, not for sessions.max_actors "
            f"({config.sessions.max_actors}): the keeper holds the other sessions"
        )
    return NodePlan(budget_nbytes, num_standbys, num_actors)
