"""The wheel is complete and stands alone: installed beside nothing of the source tree, it serves from a directory full
of files with our top-level names, and beside a foreign `cluster` package."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DECOY = 'raise ImportError("a user\'s own file was imported instead of ours")\n'


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    [path] = folder.glob("phi_cluster-*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"phi_cluster"}
    sources = {
        f"phi_cluster/{path.relative_to(ROOT)}"
        for room in ("cluster", "model", "monitoring", "configs")
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".yml", ".html", ".css", ".js", ".svg")
    }
    assert sources - set(names) == set()


@pytest.mark.slow
@pytest.mark.cluster
def test_it_serves_from_a_directory_with_our_names(
    wheel: Path, tmp_path: Path, launch_ports: Callable[[], tuple[int, int, int]], until: Callable[..., Any]
) -> None:
    import httpx

    site, cwd, foreign = tmp_path / "site", tmp_path / "cwd", tmp_path / "foreign"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
        timeout=300,
    )
    for package in (cwd / "cluster", cwd / "monitoring", cwd / "configs", foreign / "cluster"):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(DECOY)
    (cwd / "model.py").write_text(DECOY)
    port, metrics_port, internal = launch_ports()
    config = {
        "state_dir": str(tmp_path / "state"),
        "server": {"port": port, "metrics_port": metrics_port, "internal_ports": internal},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-P", "-m", "phi_cluster.cluster.cli", "serve", str(tmp_path / "config.yaml")]
    environment = os.environ | {"PYTHONPATH": f"{site}:{foreign}"}
    log = tmp_path / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(lambda: "Ready in" in log.read_text() or server.poll() is not None, "Ready", 180)
        assert server.poll() is None, log.read_text()
        question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=question, timeout=60).json()
        assert re.search("Paris", answer["choices"][0]["message"]["content"])
        [loaded_from] = {
            line.split()[-1].split("/phi_cluster/")[0]
            for line in subprocess.check_output(
                [sys.executable, "-P", "-c", "import phi_cluster.cluster.cli as m; print(m.__file__)"],
                env=environment,
                cwd=cwd,
                text=True,
            ).splitlines()
        }
        assert loaded_from == str(site)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert "stopped clean" in log.read_text()
