"""A real Prometheus under our own configuration, rules and all, that looks at one server each second.

Owns: the process, its folder, and asking it. Knows nothing of what is asked.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

MONITORING = Path(__file__).parent.parent / "monitoring"
_START_SECONDS = 60.0


class Prometheus:
    """Runs from its construction to `close`. `rules` may change the rules' text before it reads them."""

    def __init__(self, folder: Path, target: str, rules: Callable[[str], str] = str):
        """Raises RuntimeError if it is not up in time."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "rules").mkdir()
        for path in (MONITORING / "rules").glob("*.yml"):
            (folder / "rules" / path.name).write_text(rules(path.read_text()))
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "targets").mkdir()
        (folder / "targets" / "phi-cluster.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=self._log, stderr=self._log
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20.0, trust_env=False)
        deadline = time.monotonic() + _START_SECONDS
        # Until then it answers 503, in plain text.
        while not self._is_ready():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.close()
                raise RuntimeError(f"Prometheus did not start; see {folder / 'log'}")
            time.sleep(0.1)

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(f"/api/v1{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Series and values. Raises AssertionError for an expression that cannot be evaluated."""
        found = self.get("/query", query=expression)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def close(self) -> None:
        self.http.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)
        self._log.close()

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False
