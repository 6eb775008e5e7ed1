"""What a machine that has joined asks of Ray, from a process of its own: Ray ends any that is connected to it when its
node dies, and whoever has joined must live on to join again.

Owns: the questions, and how the process is run. Knows nothing of how a machine joins.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from phi_cluster.cluster.errors import StartError

_UP_SECONDS = 300.0
_ANSWER = "node_id="


class NodeDriver:
    """`head` is HOST:PORT, `address` this machine's; a node of Ray is here, or is just being started."""

    def __init__(self, head: str, address: str, runtime_dir: Path):
        self._arguments = [head, address, str(runtime_dir)]
        self._runtime_dir = runtime_dir

    def wait_up(self, goes_on: Callable[[], bool]) -> str:
        """The node's id, once sessions can be held there. Raises StartError, also when `goes_on` says no."""
        return self._run("up", _UP_SECONDS, goes_on)

    def wait_drained(self, node_id: str, seconds: float, goes_on: Callable[[], bool]) -> None:
        """Until nothing is left to wait for on the node. Raises StartError if there is after so long."""
        self._run(f"drained:{node_id}", seconds, goes_on)

    def _run(self, what: str, seconds: float, goes_on: Callable[[], bool]) -> str:
        command = [sys.executable, "-P", "-m", __name__, what, *self._arguments]
        deadline = time.monotonic() + seconds
        last = ""
        while goes_on() and time.monotonic() < deadline:
            with subprocess.Popen(
                command, cwd=self._runtime_dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as asking:
                try:
                    while asking.poll() is None and goes_on() and time.monotonic() < deadline:
                        time.sleep(0.1)
                finally:
                    asking.kill()
                answer, complaint = asking.communicate()
            if asking.returncode == 0:
                # Ray prints to the same place.
                return answer.partition(_ANSWER)[2].split()[0]
            last = " ".join(complaint.split())[-200:] or last
        if goes_on():
            raise StartError(f"this machine is not part of the cluster after {seconds:.0f} s: {last}")
        raise StartError("Ray ended on this machine")


def _main(what: str, head: str, address: str, runtime_dir: str) -> None:
    import ray
    from ray.exceptions import RayError

    from phi_cluster.cluster import ray_cluster
    from phi_cluster.cluster.actors import keeper_of
    from phi_cluster.cluster.node_drain import is_drained

    ray_cluster.connect(Path(runtime_dir), head, address)
    own_id = ray.get_runtime_context().get_node_id()

    def is_up() -> bool:
        try:
            ray.get(keeper_of(own_id).start.remote(), timeout=10)
        except (ValueError, RayError):
            # Not there yet, or being restarted.
            return False
        return True

    _, _, node_id = what.partition(":")
    while not (is_drained(node_id) if node_id else is_up()):
        time.sleep(0.2)
    print(f"{_ANSWER}{own_id}", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
