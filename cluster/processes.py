"""Processes of this machine, as the kernel sees them: who they are, whether they live, what they cost, and their end.

Owns: reading `/proc`, killing one for sure, and that none leaves a core dump. Knows nothing of sessions, engines or
Ray: it is asked with pids and answers with facts. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

from phi_cluster.cluster.messages import ProcessId

_DEAD_STATES = ("Z", "X", "x")


def process_id(pid: int | None = None) -> ProcessId:
    """The identity of a process (default: this one). Raises ProcessLookupError if there is none."""
    pid = os.getpid() if pid is None else pid
    _, _, start_ticks = _read_stat(pid)
    return ProcessId(pid, start_ticks)


def is_alive(process: ProcessId) -> bool:
    """Whether this very process (not a later one with its pid) can still run instructions.

    A zombie is dead: its memory is unmapped before it becomes one. But a process whose main thread ended
    while others run on is alive, although it shows as a zombie: only the thread count tells.
    """
    try:
        state, num_threads, start_ticks = _read_stat(process.pid)
    except ProcessLookupError:
        return False
    if start_ticks != process.start_ticks:
        return False
    return state not in _DEAD_STATES or num_threads > 1


def is_running(pid: int) -> bool:
    """Whether there is any process of this number now."""
    try:
        process = process_id(pid)
    except ProcessLookupError:
        return False
    return is_alive(process)


def boot_id() -> str:
    """What tells this run of the machine's kernel from all others: ids of processes mean something within one only."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def kill_for_sure(process: ProcessId) -> None:
    """SIGKILL (which also ends one that is stopped), and returns once `is_alive` is false for good.

    Nothing happens to another process that has its pid by now.
    """
    try:
        # From here on the descriptor means whoever has the pid now, whatever the pid comes to mean.
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):
        # A kernel or a Python without them.
        fd = -1
    try:
        while is_alive(process):
            with contextlib.suppress(ProcessLookupError):
                if fd >= 0:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                else:
                    os.kill(process.pid, signal.SIGKILL)
            await _until_exit(fd)
    finally:
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def end_of(process: ProcessId) -> Iterator[asyncio.Future[None]]:
    """A future that is done when the process has ended, as the kernel tells: within a millisecond. It is watched until
    this is left; where the kernel cannot be asked, it is never done."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ended.done():
            ended.set_result(None)

    fd = -1
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        tell()
    except (AttributeError, OSError):
        # A kernel or a Python without them.
        pass
    else:
        loop.add_reader(fd, tell)
        if not is_alive(process):
            # Another process has its pid by now.
            tell()
    try:
        yield ended
    finally:
        if fd >= 0:
            loop.remove_reader(fd)
            os.close(fd)


async def _until_exit(fd: int) -> None:
    """Until the process of a descriptor has ended, if there is one; for a moment at most."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    if fd >= 0:
        loop.add_reader(fd, ended.cancel)
    try:
        await asyncio.wait({ended}, timeout=0.005 if fd < 0 else 0.1)
    finally:
        if fd >= 0:
            loop.remove_reader(fd)


def private_bytes(pid: int | None = None) -> int:
    """Bytes of anonymous memory of a process, resident or swapped (RssAnon + VmSwap).

    Mapped files, shared segments and weights are not in it. 0 for a zombie. Raises ProcessLookupError if
    there is no such process.
    """
    pid = os.getpid() if pid is None else pid
    total_kib = 0
    for line in _read(pid, "status").splitlines():
        if line.startswith((b"RssAnon:", b"VmSwap:")):
            total_kib += int(line.split()[1])
    return total_kib * 1024


def _read_stat(pid: int) -> tuple[str, int, int]:
    """State, number of threads and start time (clock ticks after boot), from `/proc/<pid>/stat` (see
    proc(5))."""
    # The command's name comes second, in parentheses, and may itself hold spaces and parentheses.
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[17]), int(fields[19])


def _read(pid: int, name: str) -> bytes:
    try:
        # No `Path`: each leaves its parts' places in a table that grows by them (`sys.intern`), and this is asked for
        # each process each second.
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None


def forbid_core_dumps() -> None:
    """This process, and all that it starts, leave no image of their memory: prompts and caches are in it.

    Where the kernel hands images to a program, a limit of 0 does not stop it; but then there is nothing in them.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/coredump_filter").write_text("0")
