"""Hosts on one machine for tests: network namespaces with addresses of their own on one bridge, whose links can be cut.

Owns: making and removing them, and running programs there. Knows nothing of what runs. Wants root and Debian's
iproute2; all addresses are the tests' own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_NETWORK = "10.77.0"
# This process's own address there.
_OBSERVER = 254


def why_not() -> str | None:
    """What is missing here, or None."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if shutil.which("ip") is None:
        return "network namespaces want Debian's iproute2"
    return None


class Host:
    """One of them. `folder` is its own, for what a machine has on its disk."""

    def __init__(self, network: Network, number: int, folder: Path):
        self._network = network
        self.name = f"{network.prefix}{number}"
        self.address = f"{_NETWORK}.{number}"
        self.folder = folder
        folder.mkdir()
        self._link = f"v{self.name}"
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "link", "add", "eth0", "type", "veth", "peer", "name", self._link, "netns", network.switch)
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", network.switch, "link", "set", self._link, "master", "br0", "up")

    def start(
        self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """A program on this host."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)],
                cwd=self.folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, command: Sequence[str]) -> str:
        """What a short program prints."""
        full = ["ip", "netns", "exec", self.name, *command]
        return subprocess.run(full, capture_output=True, text=True, check=False).stdout

    def pids(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    def commands(self) -> dict[int, str]:
        """Of its processes, by their ids."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                found[pid] = command.decode(errors="replace")
        return found

    def pid(self, part: str) -> int:
        """The one process here whose command has this in it."""
        [one] = [pid for pid, command in self.commands().items() if part in command]
        return one

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Nothing comes to it and nothing leaves it, and nobody is told."""
        _ip("-n", self._network.switch, "link", "set", self._link, "nomaster")
        try:
            yield
        finally:
            _ip("-n", self._network.switch, "link", "set", self._link, "master", "br0")

    def close(self) -> None:
        """Kills what still runs there."""
        deadline = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        _ip("netns", "del", self.name)


class Network:
    """The hosts, and this process beside them."""

    def __init__(self, folder: Path, num_hosts: int):
        self.prefix = f"ph{os.getpid() % 100_000}x"
        self.switch = f"{self.prefix}s"
        self.hosts: list[Host] = []
        self._observer = f"o{self.prefix}"
        _ip("netns", "add", self.switch)
        try:
            _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "br0", "up")
            for number in range(1, num_hosts + 1):
                self.hosts.append(Host(self, number, folder / f"host{number}"))
            _ip("link", "add", self._observer, "type", "veth", "peer", "name", "observer", "netns", self.switch)
            _ip("addr", "add", f"{_NETWORK}.{_OBSERVER}/24", "dev", self._observer)
            _ip("link", "set", self._observer, "up")
            _ip("-n", self.switch, "link", "set", "observer", "master", "br0", "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        # With it goes all that is connected to it.
        _ip("netns", "del", self.switch)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
