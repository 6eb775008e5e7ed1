"""The folder of one running server: sockets, Ray's files, HAProxy's configuration. Gone when the server is.

Owns: making it private, and clearing away what a killed server left: its folder, and an HAProxy that still listens.
Knows nothing of Ray or configuration.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
import time
from pathlib import Path

from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import is_alive, process_id

_PREFIX = "phi-"
# HAProxy takes Unix sockets of at most 97 bytes, and Serve puts a node's id of 56 between the folder and the name:
# "h/<id>/a.sock" (see ray_environment.py). Ray's own paths are shorter than its limit allows.
MAX_PATH_NBYTES = 97 - len("/h//a.sock") - 56
# A process id has at most 7 digits; 10 digits of clock ticks are 3 years of uptime, and one more are 30.
_MAX_NAME_NBYTES = len(_PREFIX) + 7 + 1 + 11
# In the environment of all processes of a server: its folder.
RUNTIME_DIR_VARIABLE = "PHI_CLUSTER_RUNTIME_DIR"


def base_dir() -> Path:
    """The system's temporary folder, or /tmp where sockets in it would have too long a path."""
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) + 1 + _MAX_NAME_NBYTES <= MAX_PATH_NBYTES else "/tmp")


def current_runtime_dir() -> Path:
    """Of the server, or the node of a cluster, that this process belongs to."""
    return Path(os.environ[RUNTIME_DIR_VARIABLE])


def create_runtime_dir(base: Path | None = None) -> Path:
    """A new folder (0700) in `base` (the system's temporary folder) that names this process."""
    me = process_id()
    path = (base or base_dir()) / f"{_PREFIX}{me.pid}-{me.start_ticks}"
    path.mkdir(mode=0o700)
    return path


def open_runtime_dir(path: Path) -> None:
    """The folder of a node that others have started: makes it, or makes it private (0700). Raises StartError if it is
    somebody else's, or may be."""
    if len(os.fsencode(path)) > MAX_PATH_NBYTES:
        raise StartError(
            f"{path} is too long for sockets: name one of at most {MAX_PATH_NBYTES} bytes "
            "(phi-cluster environment --runtime-dir)"
        )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StartError(
            f"{path} is not a folder of the user who runs Ray: remove it, or name another one "
            "(phi-cluster environment --runtime-dir)"
        )
    path.chmod(0o700)


def remove_runtime_dir(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def clear_dead_servers(base: Path | None = None) -> list[str]:
    """Removes folders of servers that are dead, and ends their HAProxy. Returns what was done, for the user."""
    done = []
    for path in (base or base_dir()).glob(f"{_PREFIX}[0-9]*-[0-9]*"):
        try:
            pid, start_ticks = (int(part) for part in path.name.removeprefix(_PREFIX).split("-"))
            ours = path.lstat().st_uid == os.getuid() and not path.is_symlink()
        except (ValueError, OSError):
            continue
        if not ours or is_alive(ProcessId(pid, start_ticks)):
            continue
        for orphan in _processes_of(path):
            with contextlib.suppress(ProcessLookupError):
                identity = process_id(orphan)
                os.kill(orphan, signal.SIGKILL)
                _wait_dead(identity)
                done.append(f"ended process {orphan} of a server that was killed")
        remove_runtime_dir(path)
    return done


def _wait_dead(process: ProcessId, seconds: float = 5.0) -> None:
    """Its ports are free only then."""
    deadline = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)


def _processes_of(path: Path) -> list[int]:
    """Our processes that were started by the server of this folder: they inherited its mark."""
    mark = f"{RUNTIME_DIR_VARIABLE}={path}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if entry.stat().st_uid == os.getuid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
