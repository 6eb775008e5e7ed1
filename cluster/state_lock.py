"""One server, or one node of a cluster, for a state directory: two keepers would hold the same sessions.

Owns: the folder, and the lock for as long as the process lives. Knows nothing of what lies there.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from phi_cluster.cluster.errors import StartError


def lock_state(state_path: Path) -> IO[str]:
    """The lock; closing it, or the process's end, lets go. Raises StartError."""
    state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Whatever the folder above lets others do: conversations are private.
    (state_path / "sessions").mkdir(mode=0o700, exist_ok=True)
    (state_path / "sessions").chmod(0o700)
    lock = open(state_path / "lock", "w")  # noqa: SIM115 -- held for as long as the server runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise StartError(f"state_dir: another phi-cluster uses {state_path}; end it or set another state_dir") from None
    return lock
