"""One more machine of a cluster: checks, a Ray node of its own, and its way out.

Owns: the order of joining and leaving. What runs here is started by the controller (node_starts.py). Knows nothing of
the command line's looks.
"""

from __future__ import annotations

import socket
from pathlib import Path

from phi_cluster.cluster.cluster_record import ClusterRecord
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.node_driver import NodeDriver
from phi_cluster.cluster.preflight import check_node, check_platform, inspect_machine, object_store_nbytes
from phi_cluster.cluster.ray_cluster import RayNode, drain_node
from phi_cluster.cluster.report import Report
from phi_cluster.cluster.runtime_dir import clear_dead_servers
from phi_cluster.cluster.state_lock import lock_state


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
        address = address or _address_towards(head)
        self._driver = NodeDriver(head, address, runtime_dir)
        self._node = RayNode(runtime_dir, head, address, wanted, object_store_nbytes(record.weights_nbytes))
        try:
            self.node_id = self._driver.wait_up(lambda: self._node.lives)
        except StartError as error:
            told = "" if self._node.lives else f": {self._node.complaint}"
            self.end()
            raise StartError(f"{error.message}{told}") from None
        except BaseException:
            self.end()
            raise

    @property
    def lives(self) -> bool:
        """False once Ray has ended here: the head is gone, or has taken this machine for lost."""
        return self._node.lives

    def leave(self) -> None:
        """Sessions move and streams end, for as long as `nodes.drain` at most; then everything here ends."""
        seconds = self._config.nodes.drain
        try:
            drain_node(self._head, self.node_id, seconds)
            self._driver.wait_drained(self.node_id, seconds, lambda: self._node.lives)
        except StartError:
            # What is left ends now.
            pass
        finally:
            self.end()

    def end(self) -> None:
        """At once."""
        self._node.end()
        self._lock.close()


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
