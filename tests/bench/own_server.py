"""A server of a bench's own, for as long as it runs.

Owns: its folder, its process, and its end. Knows nothing of what it is used for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


@contextlib.contextmanager
def own_server(
    config: Mapping[str, Any], port: int, internal_ports: int, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, int]]:
    """`phi-cluster serve` with this configuration on this port (metrics on the next; see server.internal_ports for
    the others), and its address and pid once it is ready. `environment` is added to its own."""
    with tempfile.TemporaryDirectory(prefix="phi-bench-") as folder:
        own = {
            "state_dir": f"{folder}/state",
            "server": {"port": port, "metrics_port": port + 1, "internal_ports": internal_ports},
        }
        path, log = Path(folder) / "config.yaml", Path(folder) / "log"
        path.write_text(yaml.safe_dump({**config, **own}))
        command = [sys.executable, "-m", "phi_cluster.cluster.cli", "serve", str(path)]
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )
        try:
            while "Ready in" not in log.read_text(errors="replace"):
                if server.poll() is not None:
                    sys.exit(f"the server did not start: {log.read_text(errors='replace')}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            server.terminate()
            server.wait()
