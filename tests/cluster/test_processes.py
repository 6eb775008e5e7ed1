"""Identity, liveness and private memory of real processes."""

import asyncio
import contextlib
import ctypes
import mmap
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.processes import boot_id, end_of, is_alive, kill_for_sure, private_bytes, process_id


@contextlib.contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python child that has printed one line (it is where we want it) and waits on stdin."""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with process:
        try:
            yield process
        finally:
            process.kill()


WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


def test_self_has_an_identity_and_is_alive() -> None:
    me = process_id()
    assert me.pid == os.getpid()
    assert me == process_id(os.getpid())
    assert is_alive(me)


def test_a_later_process_with_the_same_pid_is_not_the_same() -> None:
    me = process_id()
    assert not is_alive(ProcessId(me.pid, me.start_ticks + 1))
    assert not is_alive(ProcessId(me.pid, me.start_ticks - 1))


def test_a_zombie_is_dead() -> None:
    with child(WAIT) as process:
        identity = process_id(process.pid)
        assert is_alive(identity)
        process.kill()
        # Waits for the end without reaping: the zombie stays.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(identity)
        process.wait()
        assert not is_alive(identity)
        with pytest.raises(ProcessLookupError):
            process_id(process.pid)
        with pytest.raises(ProcessLookupError):
            private_bytes(process.pid)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls exit(2) of one thread by its number")
def test_a_process_whose_main_thread_ended_is_alive_while_another_runs() -> None:
    code = (
        "import ctypes, sys, threading\n"
        "def wait():\n"
        "    while 'Z' not in open('/proc/self/stat').read().rpartition(')')[2]: pass\n"
        "    print('up', flush=True); sys.stdin.read()\n"
        "threading.Thread(target=wait).start()\n"
        # 60 is exit(2): it ends the calling thread only. CDLL releases the interpreter lock around it.
        "ctypes.CDLL(None).syscall(60, 0)\n"
    )
    with child(code) as process:
        identity = process_id(process.pid)
        assert is_alive(identity)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(identity)


def test_names_with_spaces_and_parentheses_are_read() -> None:
    code = f"open('/proc/self/comm', 'w').write('a) S (b 1 2'); {WAIT}"
    with child(code) as process:
        identity = process_id(process.pid)
        assert is_alive(identity)
        assert identity.start_ticks > process_id().start_ticks - 1


def test_private_bytes_count_anonymous_memory_and_not_shared() -> None:
    size = 32 << 20
    before = private_bytes()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(private)), 1, size)
        assert private_bytes() - before > size * 0.95
    before = private_bytes()
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as shared:
        shared.write(b"x" * 4096 * 4)
        assert private_bytes() - before < size * 0.1
    os.close(fd)


def test_who_asks_for_it_again_and_again_does_not_grow() -> None:
    """A `Path` for each question would: its parts take places in the table of interned strings, which is built anew,
    larger, once it is full. It is about as full here as in our processes."""
    script = """
import sys
names = [sys.intern(f"name-{number}") for number in range(30_000)]
from phi_cluster.cluster.processes import private_bytes
before = private_bytes()
for _ in range(30_000):
    after = private_bytes()
print(after - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300_000


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_process_is_killed_for_sure_also_if_it_was_stopped(stopped: bool) -> None:
    with child(WAIT) as process:
        identity = process_id(process.pid)
        if stopped:
            process.send_signal(signal.SIGSTOP)
        await kill_for_sure(identity)
        assert not is_alive(identity)
        # Not reaped: nobody can have its pid yet. What continues it now finds nothing that runs.
        process.send_signal(signal.SIGCONT)
        assert not is_alive(identity)
        await kill_for_sure(identity)
        assert process.wait() == -signal.SIGKILL
        await kill_for_sure(identity)


async def test_whoever_has_the_pid_of_a_dead_process_is_not_killed() -> None:
    with child(WAIT) as process:
        identity = process_id(process.pid)
        await kill_for_sure(ProcessId(identity.pid, identity.start_ticks - 1))
        await asyncio.sleep(0.01)
        assert is_alive(identity)


def test_core_dumps_are_forbidden_for_all_that_is_started() -> None:
    code = (
        "import subprocess, sys; from phi_cluster.cluster.processes import forbid_core_dumps; forbid_core_dumps();"
        "print(subprocess.check_output(['cat', '/proc/self/limits', '/proc/self/coredump_filter'], text=True))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True).stdout
    [line] = [line for line in told.splitlines() if line.startswith("Max core file size")]
    assert line.split()[4:6] == ["0", "0"]
    assert int(told.split()[-1], 16) == 0


def test_the_boot_has_an_id_that_all_processes_see():
    code = "from phi_cluster.cluster.processes import boot_id; print(boot_id())"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert seen.stdout.strip() == boot_id()
    assert len(boot_id()) == 36


async def test_the_end_of_a_process_is_told_at_once() -> None:
    with child(WAIT) as process, end_of(process_id(process.pid)) as ended:
        await asyncio.sleep(0.01)
        assert not ended.done()
        process.kill()
        await asyncio.wait_for(ended, 30)


async def test_who_is_dead_has_ended() -> None:
    with child(WAIT) as process:
        identity = process_id(process.pid)
    with end_of(identity) as ended:
        assert ended.done()
    me = process_id()
    with end_of(ProcessId(me.pid, me.start_ticks - 1)) as ended:
        assert ended.done()


async def test_nothing_is_watched_when_nobody_asks() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with end_of(process_id()) as ended:
            assert not ended.done()
    assert len(os.listdir("/proc/self/fd")) == before
