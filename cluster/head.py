"""What runs on the head of a cluster beside Serve: its controller, and the keeper and weight store of the node.

Owns: starting them, once or again on a Ray that had them before. Knows nothing of Serve, and of who starts them.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from phi_cluster.cluster.actors import CONTROLLER, NAMESPACE, create, detached_options, keeper_names, weight_store_name
from phi_cluster.cluster.cluster_record import ClusterRecord, publish, published
from phi_cluster.cluster.controller import Controller
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.node_tasks import node_actors, start_keeper
from phi_cluster.cluster.preparation import Prepared, build_info

_START_SECONDS = 300.0
_END_SECONDS = 20.0


def claim(prepared: Prepared) -> None:
    """Leaves the cluster's record with Ray, for machines that join. Raises StartError if this Ray serves with another
    configuration already."""
    record = _record(prepared)
    if (before := published()) is not None and before.config != record.config and _answers(CONTROLLER):
        raise StartError(
            "this Ray serves with another configuration already: end that server first, or start this one on a cluster "
            "of its own (a RayService makes one when its rayClusterConfig changes)"
        )
    publish(record)


def start_head(prepared: Prepared, node_id: str, runtime_dir: Path) -> None:
    """Starts the actors of the node that this is, which `runtime_dir` belongs to, and waits until they work."""
    store, keeper = node_actors(node_id, prepared.served, prepared.config, prepared.plan)
    controller = create(
        Controller,
        detached_options(CONTROLLER, node_id),
        prepared.served,
        prepared.config,
        prepared.weights_nbytes,
        build_info(prepared),
        runtime_dir,
    )
    ray.get([store.weights.remote(), controller.start.remote()], timeout=_START_SECONDS)
    start_keeper(keeper)


def start_head_again(prepared: Prepared, node_id: str, runtime_dir: Path) -> None:
    """Like `start_head`, on a Ray that may have had them before: where all of them live they are kept, else what is
    left of a head or a server that is gone is replaced."""
    keepers = keeper_names(node_id)
    others = (CONTROLLER, weight_store_name(node_id))
    if any(_answers(name) for name in keepers) and all(_answers(name) for name in others):
        return
    for name in (*keepers, *others):
        _end(name)
    start_head(prepared, node_id, runtime_dir)


def _record(prepared: Prepared) -> ClusterRecord:
    return ClusterRecord.of(prepared.config, prepared.num_threads, prepared.weights_nbytes)


def _answers(name: str) -> bool:
    with contextlib.suppress(ValueError, RayError):
        actor = ray.get_actor(name, namespace=NAMESPACE)
        call: Any = actor.weights if name.startswith("weights-") else actor.start
        ray.get(call.remote(), timeout=_END_SECONDS)
        return True
    return False


def _end(name: str) -> None:
    """Until its name is free."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            return
        time.sleep(0.1)
    raise StartError(f"the {name} of a head that is gone does not end")
