"""Names and lifetimes of our Ray actors.

Owns: the namespace, the names, and the options that make an actor outlive its creator on a chosen node. Knows nothing
of what the actors do.
"""

from __future__ import annotations

from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "phi-cluster"
CONTROLLER = "controller"
SESSION_PREFIX = "session-"


def create(actor_class: Any, options: dict[str, Any], *arguments: Any) -> Any:
    """A handle of a new actor (`actor_class` is what `ray.remote` made of a class)."""
    return actor_class.options(**options).remote(*arguments)


def keeper_names(node_id: str) -> tuple[str, str]:
    """The first keeper of a node has the first, its successor the second, and so on in turn."""
    return f"keeper-{node_id}", f"keeper-{node_id}-next"


def weight_store_name(node_id: str) -> str:
    return f"weights-{node_id}"


def detached_options(name: str, node_id: str, *, restarts: int = -1) -> dict[str, Any]:
    """Options of a named actor that outlives whoever creates it, on one node.

    The node is explicit because a placement group would capture its children, and take them with it. Calls are
    never repeated by Ray (`max_task_retries` stays 0): a repeated call may have happened.
    """
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": restarts,
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
    }
