"""In the place of Ray's dashboard agent: a process that does nothing, and ends with its raylet.

Owns: saying that it offers nothing. Knows nothing of Ray but the files in which an agent leaves its ports; it is run
as a script of its own, so it imports next to nothing. Ray's agent serves a dashboard that we do not start and metrics
that we turn off, takes 60 MB for it, and grows with every worker there ever was.
"""

import os
import sys
import time

# What a raylet waits for, each in a file `NAME_<node id>`. -1: not served.
_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
# Between two looks whether the raylet lives.
_LOOK_SECONDS = 1.0


def main(session_dir: str, node_id: str, *ignored: str) -> None:
    """`ignored`: options that the raylet adds for its own agent."""
    raylet = os.getppid()
    for name in _PORTS:
        path = os.path.join(session_dir, f"{name}_{node_id}")
        with open(f"{path}.new", "w") as file:
            file.write("-1")
        os.rename(f"{path}.new", path)
    while os.getppid() == raylet:
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
