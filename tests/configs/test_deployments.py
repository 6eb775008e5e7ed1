"""The files for containers and systemd say what the server and the package are like."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import phi_cluster.configs
from phi_cluster.cluster import cli
from phi_cluster.cluster.config import Config, load_config
from phi_cluster.cluster.node_plan import plan_node
from phi_cluster.cluster.preflight import Machine, object_store_nbytes

ROOT = Path(__file__).parent.parent.parent
CONFIGS = Path(phi_cluster.configs.__path__[0])
DOCKERFILE = (ROOT / "configs/Dockerfile").read_text()
UNIT = (ROOT / "configs/phi-cluster.service").read_text()
NODE_UNIT = (ROOT / "configs/phi-cluster-node.service").read_text()
EXAMPLE = (CONFIGS / "cluster.yaml").read_text()
# Of Phi-3-mini, int8.
WEIGHTS_NBYTES = 4_100_000_000


def directives(name: str, unit: str = UNIT) -> list[str]:
    """The unit's values of a setting."""
    return re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_accepted(path: Path) -> None:
    load_config(path, {})


def test_the_image_has_what_it_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert copied == [".", "configs/container.yaml"]
    assert all((ROOT / path).exists() for path in copied)


def test_the_image_and_its_configuration_agree() -> None:
    config = load_config(CONFIGS / "container.yaml", {})
    volumes = re.search(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)
    assert volumes
    assert f'["{config.state_dir}", "{config.cache_dir}"]' == volumes[1]
    assert f"install -d -o phi-cluster -m 700 {config.state_dir} {config.cache_dir}" in DOCKERFILE
    assert f"EXPOSE {config.server.port} {config.server.metrics_port}" in DOCKERFILE
    assert f"http://127.0.0.1:{config.server.port}/ready" in DOCKERFILE
    assert f"keys.yaml:{config.server.keys}:ro" in DOCKERFILE
    # It listens to the world, so there must be keys.
    assert config.server.host == "0.0.0.0"
    assert config.server.keys is not None


def test_the_image_has_the_torch_that_the_package_wants() -> None:
    [wanted] = re.findall(r'"(torch>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert f"'{wanted}'" in DOCKERFILE


def test_the_shared_memory_suffices_for_the_default_model() -> None:
    assert "--shm-size 1g" in DOCKERFILE
    assert object_store_nbytes(192 * 10**6) < 2**30


def test_the_unit_waits_for_the_drain() -> None:
    assert float(directives("TimeoutStopSec")[0]) > Config().server.drain + 10
    # Its processes must not be told to end before the streams have.
    assert directives("KillMode") == ["mixed"]


def test_the_units_folders_are_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in directives("Environment")[0].split():
        monkeypatch.setenv(*setting.split("="))
    config = load_config(CONFIGS / "smollm2.yaml", {})
    assert config.state_path == Path("/var/lib") / directives("StateDirectory")[0]
    assert config.cache_path == Path("/var/cache") / directives("CacheDirectory")[0]


def test_a_machine_that_joins_has_the_time_to_leave_and_the_same_folders() -> None:
    example = load_config(CONFIGS / "cluster.yaml", {})
    assert float(directives("TimeoutStopSec", NODE_UNIT)[0]) >= example.nodes.drain + 30
    assert directives("KillMode", NODE_UNIT) == ["mixed"]
    assert str(example.state_dir) == f"/var/lib/{directives('StateDirectory', NODE_UNIT)[0]}"
    assert str(example.cache_dir) == f"/var/cache/{directives('CacheDirectory', NODE_UNIT)[0]}"
    [command] = directives("ExecStart", NODE_UNIT)
    parsed = cli._parser().parse_args(command.replace("${PHI_CLUSTER_HEAD}", "10.0.0.1:9480").split()[1:])
    assert parsed.token_file == example.nodes.token_file
    assert f"PHI_CLUSTER_HEAD={example.nodes.address}:{example.nodes.port}" in NODE_UNIT


def test_the_example_of_three_machines_fits_on_them() -> None:
    """As it says at its top: 16 cores and 64 GiB each."""
    config = load_config(CONFIGS / "cluster.yaml", {})
    assert config.max_replicas == 3 * config.replicas_per_node
    assert config.engine.num_threads == 16 // config.replicas_per_node
    machine = Machine(16, 64 * 2**30, 60 * 2**30, "AVX-512")
    plan = plan_node(config, machine, WEIGHTS_NBYTES, pytest.fail)
    assert (plan.num_standbys, plan.num_session_actors) == (1, config.sessions.max_actors)


def test_the_example_says_what_it_is() -> None:
    config = load_config(CONFIGS / "cluster.yaml", {})
    assert f"the head ({config.nodes.address})" in EXAMPLE
    commands = re.findall(r"^# On the \w+: +phi-cluster (.*?) +\(configs/([a-z.-]+)\)$", EXAMPLE, re.MULTILINE)
    assert len(commands) == 2
    for command, unit in commands:
        cli._parser().parse_args(command.split())
        assert (ROOT / "configs" / unit).exists()
    for role in ("phi-cluster\n", "join 10.0.0.1 --token-file /etc/phi-cluster/token"):
        assert role in DOCKERFILE
    shm = re.findall(r"--network host --shm-size (\d+)g", DOCKERFILE)
    assert len(shm) == 2
    assert {int(one) * 10**9 > object_store_nbytes(WEIGHTS_NBYTES) for one in shm} == {True}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", [UNIT, NODE_UNIT], ids=["head", "node"])
def test_systemd_understands_the_unit(unit: str, tmp_path: Path) -> None:
    path = tmp_path / "phi-cluster.service"
    # It looks whether the program is there.
    path.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "phi-cluster" in line]) == (0, [])
