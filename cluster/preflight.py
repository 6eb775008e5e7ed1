"""What would stop a start, found before anything is started, each in one sentence with the remedy.

Owns: what this machine has for us (cores, memory) and how that is shared out, and the checks of ports, disk, /dev/shm.
Knows nothing of Ray, models' contents or HTTP.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phi_cluster.cluster.cgroup import CGROUP, PROC, cpu_quota, memory_limits
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.keys import KeyFile

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What the processes other than engines take, with Ray's own: measured, rounded up.
PROCESSES_NBYTES = 1_500 * 10**6
ENGINE_NBYTES = 500 * 10**6
STANDBY_ENGINE_NBYTES = 400 * 10**6
SESSION_ACTOR_NBYTES = 60 * 10**6
_LEAST_DISK_NBYTES = 500 * 10**6
# Room for large messages, and Ray's own limit (80 %) with a distance.
_OBJECT_STORE_EXTRA_NBYTES = 200 * 10**6
SPILL_SHARE = 0.7


@dataclass(frozen=True)
class Machine:
    """What this process may use. `memory_nbytes` is the least of the cgroups' limits and the machine's memory."""

    cores: int
    memory_nbytes: int
    available_nbytes: int
    instructions: str


def inspect_machine(proc: Path = PROC, cgroup: Path = CGROUP) -> Machine:
    """Reads /proc and what the cgroups of this process allow."""
    meminfo = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        meminfo[name] = int(value.split()[0]) * 1024
    memory, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    for limit in memory_limits(proc, cgroup):
        if limit.limit_nbytes < meminfo["MemTotal"]:
            memory = min(memory, limit.limit_nbytes)
            available = max(min(available, limit.limit_nbytes - limit.used_nbytes), 0)
    return Machine(_cores(proc, cgroup), memory, available, _instructions(proc))


def check_platform() -> None:
    """Raises StartError off Linux."""
    if not sys.platform.startswith("linux"):
        raise StartError(f"phi-cluster runs on Linux only (memfd, /proc); this is {sys.platform}")


def has_package(name: str) -> bool:
    """Whether the package could be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # One that it lies in.
        return False


def check_config(
    config: Config,
    machine: Machine,
    shm: Path = Path("/dev/shm"),
    has_package: Callable[[str], bool] = has_package,
) -> None:
    """Raises StartError for what can be known from the configuration and the machine alone."""
    if os.environ.get("RAY_ADDRESS") and config.nodes.ray_address is None:
        raise StartError(
            f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}: phi-cluster starts a Ray of its own, since Serve's settings "
            "must be in all of its processes; unset RAY_ADDRESS, or say --address auto to serve on that one"
        )
    if config.has_nodes and config.server.host in LOOPBACK:
        raise StartError(
            f"server.host: {config.server.host} is not reached by the HAProxys of the other machines; "
            "make keys (phi-cluster keys new), set server.keys, and server.host: 0.0.0.0"
        )
    if config.server.host not in LOOPBACK and config.server.keys is None:
        raise StartError(
            f"server.host: {config.server.host} would serve without API keys to everyone who can reach it; "
            "make keys (phi-cluster keys new) and set server.keys, or use 127.0.0.1"
        )
    if config.keys_path is not None:
        # What is wrong with it is said here, in one sentence.
        KeyFile(config.keys_path)
    if config.tracing.endpoint is not None and not has_package("opentelemetry.exporter.otlp.proto.http"):
        raise StartError("tracing.endpoint wants OpenTelemetry's exporter: pip install 'phi-cluster[otel]'")
    if config.server.port == config.server.metrics_port:
        raise StartError(f"server.metrics_port: {config.server.metrics_port} is server.port too; choose another port")
    for name, path in (("state_dir", config.state_path), ("cache_dir", config.cache_path)):
        check_folder(name, path)
    if not shm.is_dir():
        raise StartError(f"{shm} is missing: Ray's object store needs it; in a container, mount a tmpfs there")


def check_ports(config: Config) -> None:
    """Raises StartError if something listens already where the server will."""
    server, nodes = config.server, config.nodes
    if nodes.address is not None:
        check_port("nodes.port", nodes.address, nodes.port)
    check_port("server.port", server.host, server.port)
    check_port("server.metrics_port", server.metrics_host, server.metrics_port)


def check_node(config: Config, weights_nbytes: int, shm: Path = Path("/dev/shm")) -> None:
    """Of a machine that joins: what can be known before it has. Raises StartError."""
    check_port("server.port", config.server.host, config.server.port)
    for name, path in (("state_dir", config.state_path), ("cache_dir", config.cache_path)):
        check_folder(name, path)
    if config.keys_path is not None:
        KeyFile(config.keys_path)
    check_shm(weights_nbytes, shm)


def check_port(name: str, host: str, port: int) -> None:
    """Raises StartError if something listens on the port already (HAProxy would share it silently)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Without SO_REUSEPORT a bind fails also where HAProxy, which sets it, would succeed.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise StartError(
                f"{name}: cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}); "
                f"end what uses it or choose another port"
            ) from None


def check_folder(name: str, path: Path) -> None:
    """Makes the folder (0700) and raises StartError if it cannot be written or its disk is nearly full."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise StartError(f"{name}: cannot write to {path} ({error.strerror})") from None
    free = shutil.disk_usage(path).free
    if free < _LEAST_DISK_NBYTES:
        raise StartError(
            f"{name}: {path} has {free // 10**6} MB left on its disk, at least {_LEAST_DISK_NBYTES // 10**6} MB are "
            "needed; free some or set another folder"
        )


def kv_budget(config: Config, machine: Machine, weights_nbytes: int) -> int:
    """Bytes of KV cache for the node. Raises StartError if weights, processes and a least budget do not fit.

    Unset, it is half of what is left: the rest is for activations, page cache and neighbours. KV segments are shared
    memory, which counts as the cgroup's.
    """
    fixed = fixed_nbytes(config, weights_nbytes)
    room = machine.available_nbytes - fixed
    wanted = config.kv.budget if config.kv.budget is not None else max(room // 2, 0)
    if room < wanted or wanted < 32 * 2**20:
        raise StartError(
            f"too little memory: {machine.available_nbytes // 10**6} MB are available, weights and processes take "
            f"{fixed // 10**6} MB and the KV cache {max(wanted, 32 * 2**20) // 10**6} MB; "
            "free memory, lower kv.budget or choose a smaller model or dtype"
        )
    return wanted


def check_shm(weights_nbytes: int, shm: Path = Path("/dev/shm")) -> None:
    """Before Ray has its object store there. Raises StartError if there is no room for it."""
    if not shm.is_dir():
        raise StartError(f"{shm} is missing: Ray's object store needs it; in a container, mount a tmpfs there")
    free, needed = shutil.disk_usage(shm).free, object_store_nbytes(weights_nbytes)
    if needed > free:
        raise StartError(
            f"{shm} has {free // 10**6} MB free, the object store with the weights needs {needed // 10**6} MB "
            f"there; enlarge it (docker run --shm-size {needed}) or choose a smaller model or dtype"
        )


def standby_engines(config: Config, machine: Machine, weights_nbytes: int, kv_nbytes: int) -> int:
    """Engines that stand by for each replica, of `kv_nbytes` of KV cache on the node. Raises StartError if those that
    are asked for do not fit."""
    wanted = config.engine.standby_engines
    if config.device == "cuda":
        if wanted:
            raise StartError(
                f"engine.standby_engines: {wanted} would each hold the weights in the GPU's memory once more; "
                "set it to 0 with device cuda"
            )
        return 0
    fixed = fixed_nbytes(config, weights_nbytes) + kv_nbytes
    left = machine.available_nbytes - fixed
    needed = config.replicas_per_node * STANDBY_ENGINE_NBYTES
    if wanted is None:
        return 1 if left >= needed else 0
    if wanted and left < wanted * needed:
        raise StartError(
            f"engine.standby_engines: {wanted} for each replica take {wanted * needed // 10**6} MB, and "
            f"{max(left, 0) // 10**6} MB are left after weights, processes and KV cache; lower it or kv.budget"
        )
    return wanted


def session_actors(config: Config, machine: Machine, weights_nbytes: int, kv_nbytes: int, num_standbys: int) -> int:
    """How many session actors there may be: `sessions.max_actors`, or as many as memory is left for.

    Sessions without one are held by the keeper, and nothing else is different. A tenth of the machine stays free: for
    the page cache, and for successors that are up before their predecessors have ended.
    """
    fixed = fixed_nbytes(config, weights_nbytes) + config.replicas_per_node * num_standbys * STANDBY_ENGINE_NBYTES
    left = machine.available_nbytes - fixed - kv_nbytes - machine.memory_nbytes // 10
    return max(min(config.sessions.max_actors, left // SESSION_ACTOR_NBYTES), 0)


def fixed_nbytes(config: Config, weights_nbytes: int) -> int:
    """What the server takes in any case, without KV caches, standby engines and session actors."""
    return object_store_nbytes(weights_nbytes) + PROCESSES_NBYTES + config.replicas_per_node * ENGINE_NBYTES


def object_store_nbytes(weights_nbytes: int) -> int:
    """Size of Ray's object store in bytes: with the weights it stays below the share at which Ray begins to spill."""
    return int(weights_nbytes / SPILL_SHARE) + _OBJECT_STORE_EXTRA_NBYTES


def _cores(proc: Path, cgroup: Path) -> int:
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(proc, cgroup)
    return cores if quota is None else max(1, min(cores, round(quota)))


def _instructions(proc: Path) -> str:
    """The best instruction set for matrix products, in words."""
    words = set((proc / "cpuinfo").read_text().split())
    for flag, name in (
        ("amx_bf16", "AMX bf16"),
        ("avx512_bf16", "AVX-512 bf16"),
        ("avx512f", "AVX-512"),
        ("avx2", "AVX2"),
        ("asimd", "NEON"),
    ):
        if flag in words:
            return name
    return "no vector instructions"
