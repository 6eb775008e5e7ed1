"""A real server on a Ray that somebody else has started: by `phi-cluster serve --address`, and as Serve builds it for
KubeRay. One Ray for all; the tests follow each other."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from phi_cluster.cluster.keys import hash_of
from tests.cluster.running_ray import RunningRay

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

_READY_SECONDS = 300.0


@pytest.fixture(scope="module")
def ports(launch_ports: Callable[[], tuple[int, int, int]]) -> tuple[int, int, int]:
    return launch_ports()


@pytest.fixture(scope="module")
def running(ports: tuple[int, int, int]) -> Iterator[RunningRay]:
    # Short, for sockets.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as name:
        folder = Path(name)
        (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": [{"name": "me", "hash": hash_of("phi-me")}]}))
        port, metrics_port, internal_ports = ports
        config = {
            "state_dir": str(folder / "state"),
            "engine": {"num_threads": 1, "standby_engines": 0},
            "kv": {"budget": "200MB"},
            "server": {
                "host": "0.0.0.0",
                "port": port,
                "metrics_port": metrics_port,
                "internal_ports": internal_ports,
                "keys": str(folder / "keys.yaml"),
                "drain": "2s",
            },
        }
        running = RunningRay(folder, config, internal_ports + 500)
        try:
            yield running
        finally:
            running.close()


@pytest.fixture
def say(ports: tuple[int, int, int]) -> Callable[..., dict[str, Any]]:
    def say(session: str, *said: str) -> dict[str, Any]:
        response = httpx.post(
            f"http://127.0.0.1:{ports[0]}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": one} for one in said], "max_tokens": 8, "temperature": 0},
            headers={"authorization": "Bearer phi-me", "x-session-id": session},
            timeout=120,
        )
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    return say


def another(running: RunningRay, name: str, **changes: Any) -> Path:
    config = {**running.config, **changes}
    config["server"] = {**running.config["server"], **changes.get("server", {})}
    path = running.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def refusal(serving: subprocess.Popen[str]) -> str:
    told, _ = serving.communicate(timeout=_READY_SECONDS)
    assert serving.returncode == 1, told
    return told[told.index("error: ") :]


def test_a_ray_without_the_settings_is_refused_with_the_remedy(running: RunningRay) -> None:
    server = {"internal_ports": running.config["server"]["internal_ports"] + 1}
    told = refusal(running.serve(another(running, "other-ports", server=server)))
    assert "of this Ray was started without RAY_SERVE_DIRECT_INGRESS_M" in told
    assert "start its nodes with what `phi-cluster environment CONFIG` prints" in told
    assert running.actors() == []


def test_it_is_served_on_and_left_as_it_was(running: RunningRay, say: Callable[..., dict[str, Any]]) -> None:
    serving = running.serve(running.config_path)
    assert serving.stdout is not None
    try:
        lines = []
        while not (lines and lines[-1].startswith("Ready in")):
            lines.append(serving.stdout.readline())
            assert lines[-1], "".join(lines)
        assert say("stays", "My name is Odalys.")["usage"]["completion_tokens"] > 0
        # Nobody else may look into the folder of its sockets.
        assert (running.folder / "rt").stat().st_mode & 0o777 == 0o700
        assert "controller" in running.actors()
        # Another one is refused, and this one does not notice.
        assert "this Ray serves with another configuration already" in refusal(
            running.serve(
                another(
                    running,
                    "second",
                    state_dir=str(running.folder / "second"),
                    server={"port": running.config["server"]["port"] + 2, "metrics_port": 0 + _free(running, 3)},
                )
            )
        )
        assert say("stays", "My name is Odalys.")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        serving.send_signal(signal.SIGINT)
        told, _ = serving.communicate(timeout=120)
        assert "stopped clean" in told
        assert serving.returncode == 0
    finally:
        serving.kill()
    assert running.lives
    assert running.actors() == []
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{running.config['server']['port']}/health", timeout=5)


def _free(running: RunningRay, offset: int) -> int:
    port: int = running.config["server"]["port"] + offset
    return port


def test_serve_builds_it_by_itself(
    running: RunningRay, say: Callable[..., dict[str, Any]], until: Callable[..., Any]
) -> None:
    """As KubeRay asks for it: Serve's own file, sent to Ray's dashboard."""
    server = running.config["server"]
    manifest = Path(__file__).parent.parent.parent / "configs/k8s/rayservice.yaml"
    wanted = yaml.safe_load(next(iter(yaml.safe_load_all(manifest.read_text())))["spec"]["serveConfigV2"])
    wanted["http_options"] = {"host": server["host"], "port": server["port"]}
    wanted["applications"][0]["args"] = {"config": str(running.config_path)}
    headers = {"authorization": f"Bearer {running.token}"}
    with httpx.Client(base_url=running.dashboard, headers=headers, timeout=120) as dashboard:
        for _ in range(2):
            # The second time nothing is to be done.
            answer = dashboard.put("/api/serve/applications/", json=wanted)
            assert answer.status_code == 200, answer.text

            def status() -> str:
                [application] = dashboard.get("/api/serve/applications/").json()["applications"].values()
                assert application["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), application["message"]
                return str(application["status"])

            until(lambda: status() == "RUNNING", "the application", _READY_SECONDS)
            until(
                lambda: httpx.get(f"http://127.0.0.1:{server['port']}/ready", timeout=5).status_code == 200, "ready", 60
            )
        # What another server has said is in the journals.
        assert say("stays", "My name is Odalys.")["usage"]["completion_tokens"] > 0
        assert httpx.get(f"http://127.0.0.1:{server['metrics_port']}/metrics", timeout=10).status_code == 200
        assert len([name for name in running.actors() if name.startswith("keeper-")]) == 1
        # A head that is lost takes the controller with it, and nobody but the replicas is there to start another one.
        running.kill_actor("controller")
        until(lambda: "controller" in running.actors(), "another controller", 120)
        metrics = f"http://127.0.0.1:{server['metrics_port']}/metrics"
        until(lambda: "phi_num_requests_running" in httpx.get(metrics, timeout=10).text, "metrics", 60)
        assert dashboard.delete("/api/serve/applications/").status_code == 200
