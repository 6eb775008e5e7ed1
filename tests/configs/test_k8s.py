"""The manifests for Kubernetes: what is ours in them is what the server is like, what is KubeRay's is what it knows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from phi_cluster.cluster import cli
from phi_cluster.cluster.config import Config, load_config
from phi_cluster.cluster.preflight import object_store_nbytes

FOLDER = Path(__file__).parent.parent.parent / "configs/k8s"
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
# Of the default model, int8.
WEIGHTS_NBYTES = 192 * 10**6
CONFIG_PATH = "/etc/phi-cluster/config.yaml"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def all_manifests() -> list[dict[str, Any]]:
    return [one for path in sorted(FOLDER.glob("*.yaml")) for one in manifests(path.name)]


def of_kind(name: str, kind: str) -> dict[str, Any]:
    [found] = [one for one in manifests(name) if one["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The ConfigMap's."""
    path = tmp_path_factory.mktemp("k8s") / "config.yaml"
    path.write_text(of_kind("phi-cluster.yaml", "ConfigMap")["data"]["config.yaml"])
    return load_config(path, {})


CLUSTERS = {
    "raycluster": of_kind("raycluster.yaml", "RayCluster")["spec"],
    "rayservice": of_kind("rayservice.yaml", "RayService")["spec"]["rayClusterConfig"],
}


@pytest.fixture(params=sorted(CLUSTERS))
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = CLUSTERS[request.param]
    return found


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Head first."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    [only] = group["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def nbytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi|)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30, "": 1}[unit]


@pytest.mark.parametrize("manifest", all_manifests(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_kuberay_and_kubernetes_know_each_field(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "workerGroupSpecs", 0, "minReplica"), 1),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "readinessProbe", "httpget"), {}),
        (("spec", "enableInTreeAutoscaling"), "yes"),
    ],
)
def test_what_is_wrong_is_seen(path: tuple[Any, ...], value: Any) -> None:
    manifest = json.loads(json.dumps(of_kind("raycluster.yaml", "RayCluster")))
    place = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_kubectl_reads_them(path: Path, tmp_path: Path) -> None:
    """As far as it does without a cluster: `kustomize` parses, and puts the labels and names through."""
    (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [path.name], "namespace": "elsewhere"}))
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
    for manifest in manifests(path.name):
        one = read[manifest["kind"], manifest["metadata"]["name"]]
        assert one["metadata"]["namespace"] == "elsewhere"
        assert one.get("spec") == manifest.get("spec")


def test_the_configuration_serves_on_the_ray_of_kuberay(config: Config) -> None:
    assert config.nodes.ray_address == "auto"
    assert config.server.host == "0.0.0.0"
    assert config.server.keys is not None
    assert config.journal is not None


def test_the_pods_have_what_the_configuration_says(cluster: dict[str, Any], config: Config) -> None:
    [workers] = cluster["workerGroupSpecs"]
    assert int(container(workers)["resources"]["limits"]["cpu"]) == (
        (config.engine.num_threads or 0) * config.replicas_per_node
    )
    assert workers["minReplicas"] * config.replicas_per_node == config.replicas
    assert workers["maxReplicas"] * config.replicas_per_node == config.max_replicas
    for pod in pods(cluster):
        paths = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
        assert {str(config.state_dir), str(config.cache_dir), "/dev/shm", str(Path(CONFIG_PATH).parent)} <= paths
        assert str(config.server.keys.parent) in paths  # type: ignore[union-attr]
        # A mount within another one that is read-only cannot be made.
        assert not [one for one in paths for other in paths if one.startswith(f"{other}/")]
        names = {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
        assert names == {mount["name"] for mount in container(pod)["volumeMounts"]}


def test_ports(cluster: dict[str, Any], config: Config) -> None:
    head, *workers = pods(cluster)
    ports = {port["name"]: port["containerPort"] for port in container(head)["ports"]}
    assert ports == {
        "gcs-server": 6379, "dashboard": 8265, "serve": config.server.port, "phi-metrics": config.server.metrics_port
    }  # fmt: skip
    assert [container(one)["ports"] for one in workers] == [[{"name": "serve", "containerPort": config.server.port}]]
    annotations = head["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(config.server.metrics_port)
    assert annotations["prometheus.io/scrape"] == "true"
    service = of_kind("raycluster.yaml", "Service")["spec"]
    assert service["ports"][0]["port"] == config.server.port
    policy = [one for one in manifests("phi-cluster.yaml") if one["kind"] == "NetworkPolicy"][1]
    opened = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    assert opened == [config.server.port, config.server.metrics_port]


def test_probes_ask_what_the_server_answers(cluster: dict[str, Any]) -> None:
    probes = [
        probe["httpGet"]
        for pod in pods(cluster)
        for name, probe in container(pod).items()
        if name in ("readinessProbe", "livenessProbe", "startupProbe")
    ]
    assert {probe["path"] for probe in probes} <= {"/health", "/ready"}
    assert {probe["port"] for probe in probes} == {"serve"}
    assert all("readinessProbe" in container(workers) for workers in cluster["workerGroupSpecs"])


def test_the_object_store_holds_the_default_model(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        store = int(pod["rayStartParams"]["object-store-memory"])
        assert store >= object_store_nbytes(WEIGHTS_NBYTES)
        [shm] = [one for one in pod["template"]["spec"]["volumes"] if one["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert nbytes(shm["emptyDir"]["sizeLimit"]) > store * 1.1
        # It counts as the pod's memory.
        assert nbytes(container(pod)["resources"]["limits"]["memory"]) > store + 4 * 10**9


def test_a_pod_has_time_to_drain(cluster: dict[str, Any], config: Config) -> None:
    for pod in pods(cluster):
        assert pod["template"]["spec"]["terminationGracePeriodSeconds"] >= config.nodes.drain + 20
        assert pod["template"]["spec"]["terminationGracePeriodSeconds"] >= config.server.drain + 10
    for workers in cluster["workerGroupSpecs"]:
        command = container(workers)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "phi-cluster"
        cli._parser().parse_args(command[1:])


def test_an_empty_pod_is_let_go_before_the_autoscaler_looks_for_it(cluster: dict[str, Any], config: Config) -> None:
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert config.nodes.idle_timeout is not None
    for workers in cluster["workerGroupSpecs"]:
        assert workers["idleTimeoutSeconds"] == cluster["autoscalerOptions"]["idleTimeoutSeconds"]


def test_commands_are_the_servers(cluster: dict[str, Any]) -> None:
    """Of each line that the containers run: ours are parsed by our own parser."""
    ran = [part for pod in pods(cluster) for part in container(pod)["args"]]
    found = re.findall(r"phi-cluster ([a-z]+ [^;)\"]*)", " ; ".join(ran))
    parsed = [cli._parser().parse_args(shlex.split(one)) for one in found]
    assert {str(one.config) for one in parsed} == {CONFIG_PATH}
    for pod in pods(cluster):
        # Ray's processes get their settings before they start.
        assert container(pod)["args"][0].startswith('set -ae; settings="$(phi-cluster environment ')


def test_the_settings_are_read_by_a_shell(config: Config, tmp_path: Path) -> None:
    """What the containers' first line does, with the program's real output."""
    from phi_cluster.cluster.ray_environment import environment

    wanted = environment(config, Path("/tmp/phi"), "")
    del wanted["RAY_AUTH_TOKEN"]
    (tmp_path / "phi-cluster").write_text('#!/bin/sh\ncat "$(dirname "$0")/printed"\n')
    (tmp_path / "phi-cluster").chmod(0o755)
    (tmp_path / "printed").write_text("".join(f"{name}={value}\n" for name, value in wanted.items()))
    line = CLUSTERS["rayservice"]["headGroupSpec"]["template"]["spec"]["containers"][0]["args"][0]
    done = subprocess.run(
        # As KubeRay puts it together.
        ["/bin/bash", "-c", "--", f" {line}  && ulimit -n 1024; env -0"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    given = dict(one.split("=", 1) for one in done.stdout.split("\0") if one)
    assert {name: given.get(name) for name in wanted} == wanted
    # One that fails ends the container, rather than starting a Ray without settings.
    (tmp_path / "phi-cluster").write_text("#!/bin/sh\nexit 3\n")
    done = subprocess.run(
        ["/bin/bash", "-c", "--", f" {line}  && ulimit -n 1024; echo started"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")


def test_secrets_are_named_as_they_are_made(cluster: dict[str, Any]) -> None:
    top = (FOLDER / "phi-cluster.yaml").read_text().partition("apiVersion")[0]
    made = dict(re.findall(r"create secret generic (\S+) --from-(?:literal=|file=)([a-z_.]+)", top))
    assert made == {
        "phi-cluster-token": "auth_token",
        "phi-cluster-redis": "password",
        "phi-cluster-keys": "keys.yaml",
        "phi-cluster-hub": "token",
    }
    assert cluster["authOptions"] == {"mode": "token", "secretName": "phi-cluster-token"}
    used = {"phi-cluster-token"}
    for found in _walk(cluster):
        if "secretKeyRef" in found:
            assert found["secretKeyRef"]["key"] == made[found["secretKeyRef"]["name"]]
            used.add(found["secretKeyRef"]["name"])
        if "secretName" in found and "mode" not in found:
            used.add(found["secretName"])
    assert used == set(made)
    assert not [one for one in all_manifests() if one["kind"] == "Secret"]


def test_redis_is_one_and_keeps_everything(cluster: dict[str, Any], config: Config) -> None:
    redis = of_kind("phi-cluster.yaml", "StatefulSet")
    [one] = redis["spec"]["template"]["spec"]["containers"]
    host = redis["metadata"]["name"]
    # Ray's tables are in database 0, sessions are not.
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == f"{host}:6379"
    assert config.journal == f"redis://{host}:6379/1"
    for setting in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction", "--requirepass"):
        assert setting in one["args"][0]


def test_serve_is_told_what_the_configuration_says(config: Config) -> None:
    with warnings.catch_warnings():
        # Serve's own models are written for an older pydantic.
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema

    told = ServeDeploySchema.model_validate(
        yaml.safe_load(of_kind("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    )
    assert (told.http_options.host, told.http_options.port) == (config.server.host, config.server.port)
    assert told.proxy_location == "EveryNode"
    [application] = told.applications
    assert application.args == {"config": CONFIG_PATH}
    assert application.route_prefix == "/"
    module, _, name = application.import_path.partition(":")
    assert hasattr(__import__(module, fromlist=[name]), name)


def test_the_image_has_what_the_manifests_need() -> None:
    top = (FOLDER / "phi-cluster.yaml").read_text()
    [extras] = re.findall(r"--build-arg EXTRAS=(\S+)", top)
    pyproject = (FOLDER.parent.parent / "pyproject.toml").read_text()
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)
    assert "ARG EXTRAS=" in (FOLDER.parent / "Dockerfile").read_text()


def _walk(value: Any) -> Any:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _walk(one)
