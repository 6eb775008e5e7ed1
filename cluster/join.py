"""One more machine of a cluster: checks, a Ray node of its own, and its way out.

Owns: the order of joining and leaving. What runs here is started by the controller (node_starts.py). Knows nothing of
the command line's looks.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import ray
from ray.exceptions import RayError

from phi_cluster.cluster import ray_cluster
from phi_cluster.cluster.actors import CONTROLLER, NAMESPACE, keeper_name
from phi_cluster.cluster.cluster_record import ClusterRecord
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.preflight import check_node, check_platform, inspect_machine, object_store_nbytes
from phi_cluster.cluster.report import Report
from phi_cluster.cluster.runtime_dir import clear_dead_servers
from phi_cluster.cluster.state_lock import lock_state

_UP_SECONDS = 300.0


class JoinedNode:
    """A machine that has joined. `leave` takes it out again, `end` at once."""

    def __init__(self, record: ClusterRecord, head: str, address: str | None, runtime_dir: Path, report: Report):
        """Returns when sessions can be held here; `head` is HOST:PORT, `address` this machine's (None: the one by which
        it reaches the head). Ray's environment must have been set. Raises StartError, with nothing left behind."""
        check_platform()
        for what in clear_dead_servers():
            report.cleared(what)
        self._head = head
        self._config = record.loaded_config()
        machine = inspect_machine()
        check_node(self._config, record.weights_nbytes)
        report.checked(machine)
        wanted = record.num_threads * self._config.replicas_per_node
        if machine.cores < wanted:
            report.noted(f"this machine has {machine.cores} cores for {wanted} threads; see engine.num_threads")
        self._lock = lock_state(self._config.state_path)
        try:
            self._node = ray_cluster.join(
                runtime_dir, head, address or _address_towards(head), wanted, object_store_nbytes(record.weights_nbytes)
            )
        except BaseException:
            self._lock.close()
            raise
        try:
            self.node_id: str = ray.get_runtime_context().get_node_id()
            self._wait_for_keeper()
        except BaseException:
            self.end()
            raise

    @property
    def lives(self) -> bool:
        """False once Ray has ended here: the head is gone, or has taken this machine for lost."""
        return self._node.lives

    def leave(self) -> None:
        """Sessions move and streams end, for as long as `nodes.drain` at most; then everything here ends."""
        deadline = time.monotonic() + self._config.nodes.drain
        try:
            ray_cluster.drain_node(self._head, self.node_id, self._config.nodes.drain)
            while self._is_needed() and time.monotonic() < deadline and self._node.lives:
                time.sleep(0.5)
        finally:
            self.end()

    def end(self) -> None:
        """At once."""
        with contextlib.suppress(Exception):
            ray_cluster.stop_ray()
        self._node.end()
        self._lock.close()

    def _is_needed(self) -> bool:
        try:
            controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
            return not ray.get(controller.is_drained.remote(self.node_id), timeout=5)
        except (ValueError, RayError):
            # It is being restarted.
            return True

    def _wait_for_keeper(self) -> None:
        deadline = time.monotonic() + _UP_SECONDS
        while time.monotonic() < deadline:
            if not self._node.lives:
                raise StartError(f"Ray ended on this machine: {self._node.complaint}")
            try:
                ray.get(ray.get_actor(keeper_name(self.node_id), namespace=NAMESPACE).start.remote(), timeout=5)
                return
            except (ValueError, RayError):
                time.sleep(0.2)
        raise StartError("the cluster started no actors on this machine: its events say why (phi-cluster events)")


def _address_towards(head: str) -> str:
    """By which of this machine's addresses the head is reached. Nothing is sent."""
    host, _, port = head.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host.strip("[]"), int(port)))
        except OSError as error:
            raise StartError(f"there is no way to {host} from here: {error.strerror}") from None
        address: str = probe.getsockname()[0]
        return address
