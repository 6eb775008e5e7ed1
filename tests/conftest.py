"""A real server for tests: `phi-cluster serve` in a process of its own, seen from outside and through /proc.

Owns: starting it on free loopback ports, ending it, and the proof that nothing of it is left. Knows nothing of what is
asked of it (tests/cluster/conftest.py is its client).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from phi_cluster.cluster.runtime_dir import base_dir

T = TypeVar("T")

_START_SECONDS = 180.0
_STOP_SECONDS = 60.0
# A replica, Serve's gRPC and HAProxy's own ports lie within so many behind server.internal_ports.
_INTERNAL_PORTS = 903


def until(check: Callable[[], T], what: str, timeout: float = 30.0) -> T:
    """Asks `check` until its answer is true, and returns that. A transport's error counts as not yet."""
    import httpx

    deadline = time.monotonic() + timeout
    last: object = None
    while time.monotonic() < deadline:
        try:
            answer = check()
            if answer:
                return answer
            last = answer
        except httpx.TransportError as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout:.0f} s: {what} (last: {last!r})")


class Process:
    """A process that cannot be mistaken for a later one with its pid."""

    def __init__(self, pid: int):
        """Raises OSError if there is none."""
        self.pid = pid
        state, self.parent, self._start_ticks = self._stat()
        if state == "Z":
            raise ProcessLookupError(pid)
        self.name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()

    def __repr__(self) -> str:
        return f"{self.pid} {self.name[:100]}"

    @property
    def lives(self) -> bool:
        try:
            state, _, start_ticks = self._stat()
        except OSError:
            return False
        return state != "Z" and start_ticks == self._start_ticks

    def kill(self) -> None:
        """kill -9, and waits for the death."""
        if self.lives:
            os.kill(self.pid, signal.SIGKILL)
        until(lambda: not self.lives, f"the death of {self!r}", 10)

    def touches(self, folder: Path) -> bool:
        """Whether it was started for, works in, or holds a file of `folder`."""
        inside = f"{folder}/"
        links = [Path(f"/proc/{self.pid}/cwd")]
        with contextlib.suppress(OSError):
            links += Path(f"/proc/{self.pid}/fd").iterdir()
        for link in links:
            with contextlib.suppress(OSError):
                if f"{os.readlink(link)}/".startswith(inside):
                    return True
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{self.pid}/environ").read_bytes().decode(errors="replace")
            return inside in f"{self.name} {environment}"
        return False

    def memory_files(self) -> dict[int, Path]:
        """Its KV segments: inode -> a path that opens it (several descriptors of one count once)."""
        found = {}
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith("/memfd:phi-kv"):
                        found[link.stat().st_ino] = link
        return found

    def _stat(self) -> tuple[str, int, int]:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1]), int(fields[19])


def all_processes() -> list[Process]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.append(Process(int(entry.name)))
    return found


def listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Below the ports that the kernel gives to clients; a long run takes those of servers that have ended again.
_PORT_BLOCKS = range(10_000 + os.getpid() % 1_000, 31_000, 1_000)
_next_ports = itertools.cycle(_PORT_BLOCKS)


def _free_ports() -> tuple[int, int, int]:
    """(API, metrics, first internal) port of a block that nobody listens on."""
    for first in itertools.islice(_next_ports, len(_PORT_BLOCKS)):
        api, metrics = first + _INTERNAL_PORTS, first + _INTERNAL_PORTS + 1
        if not any(map(listens, (*range(first, first + 8), *range(first + 899, first + 903), api, metrics))):
            return api, metrics, first
    raise AssertionError("no free ports")


class Server:
    """A running `phi-cluster serve`. `state_dir` outlives it."""

    def __init__(
        self,
        folder: Path,
        state_dir: Path,
        config: Mapping[str, Any],
        ports: tuple[int, int, int],
        prefix: Sequence[str] = (),
    ):
        """Returns when it says that it is ready. `ports`: API, metrics, first internal one; `prefix`: before its
        command, of a program that becomes it (exec)."""
        self.state_dir = state_dir
        self.ports = self.port, self.metrics_port, self.internal_ports = ports
        self.url = f"http://127.0.0.1:{self.port}"
        self.metrics_url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        self.shm_before = _shm()
        self._log = folder / "log"
        own = {
            "state_dir": str(state_dir),
            "server": {
                "port": self.port,
                "metrics_port": self.metrics_port,
                "internal_ports": self.internal_ports,
                **config.get("server", {}),
            },
        }
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, **own}))
        # An empty working directory: nothing of the server may depend on where it is started.
        (folder / "cwd").mkdir()
        command = [*prefix, str(Path(sys.executable).with_name("phi-cluster")), "serve", str(folder / "config.yaml")]
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                command, cwd=folder / "cwd", stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self.main = Process(self._popen.pid)
        try:
            until(lambda: "Ready in" in self.output or self._popen.poll() is not None, "Ready", _START_SECONDS)
            assert self._popen.poll() is None, f"the server ended: {self.output}"
        except BaseException:
            self.kill_all()
            raise

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    @property
    def runtime_dir(self) -> Path:
        [folder] = base_dir().glob(f"phi-{self._popen.pid}-*")
        return folder

    def processes(self, name: str = "") -> list[Process]:
        """Its processes now, all of them or those whose command begins with `name`, in order of their pids."""
        found = {self._popen.pid}
        processes = all_processes()
        before = 0
        while len(found) != before:
            before = len(found)
            found.update(p.pid for p in processes if p.parent in found)
        ours = [p for p in processes if p.pid in found]
        with contextlib.suppress(ValueError):
            folder = self.runtime_dir
            ours += [p for p in processes if p.pid not in found and p.touches(folder)]
        return sorted((p for p in ours if p.name.startswith(name)), key=lambda p: p.pid)

    def process(self, name: str) -> Process:
        """The one process of this name; waits for it, because it may be being replaced."""

        def look() -> list[Process]:
            found = self.processes(name)
            return found if len(found) == 1 else []

        return until(look, f"one {name}")[0]

    def is_ready(self) -> bool:
        import httpx

        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        return False

    def stop(self, number: int = signal.SIGINT) -> None:
        """Ends it by a signal, and proves that nothing is left."""
        assert self._popen.poll() is None, f"the server has ended by itself: {self.output}"
        processes, folder = self.processes(), self.runtime_dir
        self._popen.send_signal(number)
        try:
            self._popen.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"not ended {_STOP_SECONDS} s after signal {number}: {self.output}") from None
        assert "stopped clean" in self.output
        assert self._popen.returncode == 0
        assert not folder.exists(), f"{folder} is left"
        left = [p for p in processes if p.lives] + [p for p in all_processes() if p.touches(folder)]
        assert not left, f"processes are left: {left}"
        ports = (self.port, self.metrics_port, *range(self.internal_ports, self.internal_ports + _INTERNAL_PORTS))
        assert not [port for port in _listening() if port in ports], "ports are left"
        assert not _shm() - self.shm_before, "files in /dev/shm are left"

    def kill_all(self, spare: str | None = None) -> list[Process]:
        """kill -9 of every process at once, but those whose command holds `spare`; returns these."""
        spared: dict[int, Process] = {}
        folder: Path | None = None
        with contextlib.suppress(ValueError):
            folder = self.runtime_dir
        known: dict[int, Process] = {}
        while True:
            for process in [*self.processes(), *(p for p in all_processes() if folder and p.touches(folder))]:
                known[process.pid] = process
            living = []
            for process in known.values():
                if spare is not None and spare in process.name:
                    spared[process.pid] = process
                elif process.lives:
                    living.append(process)
            if not [p for p in living if p.pid != self._popen.pid or self._popen.poll() is None]:
                self._popen.wait(10)
                return list(spared.values())
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def _listening() -> set[int]:
    ports = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _shm() -> set[str]:
    found = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                found.add(path.name)
    return found


class Launch:
    """Starts servers; whatever a test leaves running is killed at the end."""

    def __init__(self, make_folder: Callable[[str], Path]):
        self._make_folder = make_folder
        self._servers: list[Server] = []

    def __call__(
        self,
        config: Mapping[str, Any],
        state_dir: Path | None = None,
        like: Server | None = None,
        prefix: Sequence[str] = (),
    ) -> Server:
        """`like`: on the same ports as a server that was killed."""
        folder = self._make_folder("server")
        ports = like.ports if like is not None else _free_ports()
        server = Server(folder, state_dir or folder / "state", config, ports, prefix)
        if like is not None:
            server.shm_before = like.shm_before
        self._servers.append(server)
        return server

    def close(self) -> None:
        for server in self._servers:
            if server.main.lives:
                server.kill_all()


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """`launch(config)` starts a server and returns it when it is ready; the test stops it."""
    launch = Launch(tmp_path_factory.mktemp)
    try:
        yield launch
    finally:
        launch.close()


@pytest.fixture(scope="session", name="until")
def until_fixture() -> Callable[..., Any]:
    """`until(check, what, timeout)`: bounded polling."""
    return until


@pytest.fixture(scope="session")
def launch_ports() -> Callable[[], tuple[int, int, int]]:
    """`launch_ports()`: free (API, metrics, first internal) ports, for a test that starts a server by itself."""
    return _free_ports
