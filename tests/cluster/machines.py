"""A cluster of several machines for tests: what is started on each host, and what is asked of all of it.

Owns: the configuration that they share (token, keys, Redis), the processes and their ends. Knows nothing of hosts
(hosts.py), and of what happens to them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.keys import entry_text, new_key
from phi_cluster.model.hub import resolve_model
from tests.cluster.hosts import Host, Network, why_not
from tests.redis_process import RedisProcess

PORT = 8100
COMMAND = Path(sys.executable).with_name("phi-cluster")
JOIN_SECONDS = 180.0
DRAIN_SECONDS = 20


class Machine:
    """A host with its part of the cluster: the head serves, the others join."""

    def __init__(self, host: Host, command: list[str | Path], until: Callable[..., Any], folders: tuple[str, ...]):
        """`folders`: variables of those that are its own."""
        self.host = host
        self._environment = {name: str(host.folder / name) for name in folders}
        self.address = host.address
        self._command = command
        self._until = until
        self._log = host.folder / "log"
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self, word: str) -> None:
        """Returns when it says so."""
        before = self.output.count(word)
        self._popen = self.host.start(self._command, self._log, self._environment)
        self.wait_for(word, before + 1)

    def wait_for(self, word: str, times: int) -> None:
        assert self._popen is not None
        popen = self._popen
        self._until(
            lambda: self.output.count(word) >= times or popen.poll() is not None, f"{times} x {word}", JOIN_SECONDS
        )
        assert popen.poll() is None, f"it ended: {self.output}"

    def leave(self, number: int = signal.SIGTERM) -> None:
        """By a signal; nothing of it is left."""
        assert self._popen is not None
        self._popen.send_signal(number)
        self._popen.wait(120)
        assert self._popen.returncode == 0, self.output
        # What is left ends within seconds; here many others keep the cores busy.
        self._until(lambda: not self.host.commands(), f"the end of {self.host.commands()}", 60)

    def close(self) -> None:
        """When its host has ended."""
        if self._popen is not None:
            self._popen.wait(10)


class Cluster:
    """A head and machines that may join it, one on each host; `settings` of the configuration are the test's."""

    def __init__(
        self,
        folder: Path,
        network: Network,
        until: Callable[..., Any],
        settings: Mapping[str, Any],
        serve: Sequence[str | Path] = (COMMAND, "serve"),
    ):
        """`serve`: the command that serves a configuration."""
        (folder / "redis").mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        (folder / "token").chmod(0o600)
        self.key = new_key()
        (folder / "keys.yaml").write_text("keys:\n" + entry_text("alice", self.key, ("admin",)))
        head, *others = network.hosts
        self.redis = RedisProcess(folder / "redis")
        config = {
            "journal": self.redis.url,
            **settings,
            "nodes": {
                **settings.get("nodes", {}),
                "address": head.address,
                "token_file": str(folder / "token"),
                "drain": f"{DRAIN_SECONDS}s",
            },
            "server": {
                **settings.get("server", {}),
                "host": "0.0.0.0",
                "keys": str(folder / "keys.yaml"),
                "port": PORT,
            },
        }
        (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
        self.head = Machine(head, [*serve, folder / "cluster.yaml"], until, ("XDG_STATE_HOME",))
        joining: list[str | Path] = [COMMAND, "join", head.address, "--token-file", folder / "token"]
        self.others = [Machine(host, joining, until, ("XDG_STATE_HOME", "XDG_CACHE_HOME")) for host in others]

    def http(self, machine: Machine) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=f"http://{machine.address}:{PORT}", headers=headers, timeout=60)

    def overview(self) -> dict[str, Any]:
        with self.http(self.head) as http:
            found: dict[str, Any] = http.get("/v1/cluster").raise_for_status().json()
            return found

    def num_serving(self) -> int:
        """Nodes on which an engine makes steps."""
        return len({one["node_id"] for one in self.overview()["replicas"] if one["engine"] is not None})

    def close(self) -> None:
        """When the hosts have ended, and with them all processes."""
        self.redis.kill()
        for machine in (self.head, *self.others):
            machine.close()


@contextlib.contextmanager
def on_hosts(folder: Path, num_hosts: int, until: Callable[..., Any], settings: Mapping[str, Any]) -> Iterator[Cluster]:
    """A cluster of which nothing has been started; whatever still runs at the end is killed."""
    # Hosts cannot download it.
    resolve_model("smollm2", Config().cache_path, lambda event: None, None)
    network = Network(folder, num_hosts)
    cluster = None
    try:
        cluster = Cluster(folder, network, until, settings)
        yield cluster
    finally:
        network.close()
        if cluster is not None:
            cluster.close()


@contextlib.contextmanager
def serving(folder: Path, num_hosts: int, until: Callable[..., Any], settings: Mapping[str, Any]) -> Iterator[Cluster]:
    """A cluster whose head serves; the others have not joined. Skips the test where there can be no hosts; fails it
    there in CI."""
    if reason := why_not():
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with on_hosts(folder, num_hosts, until, settings) as cluster:
        cluster.head.start("Ready in")
        yield cluster
        cluster.head.leave(signal.SIGINT)
