"""A Ray that somebody else has started, as README says for it: `ray start` with what `phi-cluster environment` prints.

Owns: starting and ending it, and the Redis that several machines want. Knows nothing of what is served on it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.redis_process import RedisProcess

_BIN = Path(sys.executable).parent
_START_SECONDS = 400.0


class RunningRay:
    """`config` is what will be served; `env` what its processes, and ours, have in their environment; `first_port` of
    five free ones for Ray."""

    def __init__(self, folder: Path, config: dict[str, Any], first_port: int):
        self.folder = folder
        self.redis = RedisProcess(folder)
        self.token = secrets.token_hex(32)
        self.address = f"127.0.0.1:{first_port}"
        self.dashboard = f"http://127.0.0.1:{first_port + 1}"
        self.config = {"journal": self.redis.url, **config}
        self.config_path = folder / "config.yaml"
        self.config_path.write_text(yaml.safe_dump(self.config))
        (folder / "cwd").mkdir()
        printed = subprocess.run(
            [_BIN / "phi-cluster", "environment", self.config_path, "--runtime-dir", folder / "rt"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        settings = dict(one.split("=", 1) for one in shlex.split(printed))
        self.env = os.environ | settings | {"RAY_AUTH_TOKEN": self.token, "RAY_TMPDIR": str(folder)}
        # What has nothing to do with us, but may meet another Ray's, or a busy machine.
        self.env |= {"DASHBOARD_METRIC_PORT": str(first_port + 4), "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300"}
        options = {
            "--port": first_port,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": first_port + 1,
            "--dashboard-agent-listen-port": first_port + 2,
            "--ray-client-server-port": first_port + 3,
            "--node-ip-address": "127.0.0.1",
            # As Ray does by itself, but not in the range of which tests take theirs.
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--num-cpus": 2,
            "--object-store-memory": 500_000_000,
            "--temp-dir": folder / "ray",
        }
        command = [_BIN / "ray", "start", "--head", "--block", *(f"{name}={value}" for name, value in options.items())]
        with (folder / "ray.log").open("wb") as log:
            self._popen = subprocess.Popen(
                command, cwd=folder / "cwd", env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while self._asked("import ray").returncode:
            assert self._popen.poll() is None, (folder / "ray.log").read_text()
            assert time.monotonic() < deadline, "Ray did not start"
            time.sleep(0.5)

    @property
    def lives(self) -> bool:
        return self._popen.poll() is None

    def actors(self) -> list[str]:
        """The names of all detached actors."""
        done = self._asked("print(*sorted(a['name'] for a in ray.util.list_named_actors(all_namespaces=True)))")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def kill_actor(self, name: str) -> None:
        """For good: Ray starts no other one."""
        done = self._asked(f"ray.kill(ray.get_actor({name!r}, namespace='phi-cluster'), no_restart=True)")
        assert done.returncode == 0, done.stderr

    def serve(self, config_path: Path) -> subprocess.Popen[str]:
        """`phi-cluster serve --address`."""
        return subprocess.Popen(
            [_BIN / "phi-cluster", "serve", config_path, "--address", self.address],
            cwd=self.folder / "cwd", env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _asked(self, code: str) -> subprocess.CompletedProcess[str]:
        start = f"import ray; ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR'); "
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", start + code], cwd=self.folder / "cwd", env=self.env,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def close(self) -> None:
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self.redis.kill()
