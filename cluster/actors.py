"""Names and lifetimes of our Ray actors.

Owns: the namespace, the names, and the options that make an actor outlive its creator on a chosen node. Knows nothing
of what the actors do.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "phi-cluster"
CONTROLLER = "controller"
SESSION_PREFIX = "session-"


def create(actor_class: Any, options: dict[str, Any], *arguments: Any) -> Any:
    """A handle of a new actor (`actor_class` is what `ray.remote` made of a class)."""
    return actor_class.options(**options).remote(*arguments)


def find_controller() -> Any:
    """Raises ValueError while there is none."""
    return ray.get_actor(CONTROLLER, namespace=NAMESPACE)


def keeper_names(node_id: str) -> tuple[str, str]:
    """The first keeper of a node has the first, its successor the second, and so on in turn."""
    return f"keeper-{node_id}", f"keeper-{node_id}-next"


def keeper_of(node_id: str) -> Any:
    """A node's keeper; while one follows another it may be the one that is not in charge, which says so (KeeperMoved).
    Raises ValueError if there is none."""
    first, second = keeper_names(node_id)
    try:
        return ray.get_actor(first, namespace=NAMESPACE)
    except ValueError:
        return ray.get_actor(second, namespace=NAMESPACE)


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


def end_actors() -> None:
    """Ends all of ours, on a Ray that goes on without them."""
    for one in ray.util.list_named_actors(all_namespaces=True):
        if one["namespace"] == NAMESPACE:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(one["name"], namespace=NAMESPACE))
