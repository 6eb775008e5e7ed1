"""A real Redis for tests: on a Unix socket in a folder of its own, as durable as journals want it.

Owns: starting, stopping for a while, and ending it. Knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from phi_cluster.cluster.session.redis_server import RedisServer

_START_SECONDS = 20.0


class RedisProcess:
    def __init__(self, folder: Path, *settings: str):
        """Returns when it answers. Its data stays in `folder` and is there again after the next start."""
        program = shutil.which("redis-server")
        assert program, "tests of journals in Redis need redis-server (Debian's package redis-server)"
        self.folder = folder
        # Short: a socket's path has 107 bytes at most.
        self.socket = folder / "r.sock"
        self.url = f"unix://{self.socket}?db=0"
        self._servers: list[RedisServer] = []
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self._process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder), *durable, *settings],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "redis-server has ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe, contextlib.suppress(OSError):
            probe.settimeout(1.0)
            probe.connect(str(self.socket))
            probe.sendall(b"PING\r\n")
            return probe.recv(5) == b"+PONG"
        return False

    def connect(self) -> RedisServer:
        """A server's view of it, closed when this ends."""
        self._servers.append(RedisServer(self.url))
        return self._servers[-1]

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """As if the network were cut: connections stay, and nothing answers."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """kill -9; also when it has ended."""
        for server in self._servers:
            server.close()
        self._process.kill()
        self._process.wait()
