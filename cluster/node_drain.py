"""A node of a Ray that others have started leaves: what `phi-cluster join` does at its end, for who has not joined so
(a pod's preStop).

Owns: telling Ray, and whether the node is not needed any more. Knows nothing of what moves, and of who ends the node
afterwards.
"""

from __future__ import annotations

import time

import ray
from ray.exceptions import RayError

from phi_cluster.cluster import ray_cluster
from phi_cluster.cluster.actors import find_controller
from phi_cluster.cluster.cluster_record import published
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.runtime_dir import current_runtime_dir

_POLL_SECONDS = 0.5


def drain_here(address: str) -> tuple[str, bool]:
    """Drains this machine's node of the Ray at `address`, for `nodes.drain` at most: its id, and whether it came to its
    end. Raises StartError."""
    ray_cluster.connect(current_runtime_dir(), address)
    try:
        record = published()
        if record is None:
            raise StartError("no phi-cluster serves on this Ray: there is nothing to drain")
        seconds = record.loaded_config().nodes.drain
        deadline = time.monotonic() + seconds
        context = ray.get_runtime_context()
        node_id = context.get_node_id()
        ray_cluster.drain_node(context.gcs_address, node_id, seconds)
        while time.monotonic() < deadline:
            if is_drained(node_id):
                return node_id, True
            time.sleep(_POLL_SECONDS)
        return node_id, False
    finally:
        ray_cluster.stop_ray()


def is_drained(node_id: str) -> bool:
    """Whether nothing is left to wait for on the node, as the controller says. Wants a connection to Ray."""
    try:
        controller = find_controller()
        return bool(ray.get(controller.is_drained.remote(node_id), timeout=10))
    except (ValueError, RayError):
        # It is being restarted.
        return False
