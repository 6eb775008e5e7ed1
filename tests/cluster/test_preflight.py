"""What would stop a start, on machines made of files."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi_cluster.cluster.config import (
    Config,
    EngineConfig,
    KVConfig,
    NodesConfig,
    ServerConfig,
    SessionsConfig,
    TracingConfig,
)
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.preflight import (
    ENGINE_NBYTES,
    PROCESSES_NBYTES,
    SESSION_ACTOR_NBYTES,
    STANDBY_ENGINE_NBYTES,
    Machine,
    check_config,
    check_folder,
    check_node,
    check_platform,
    check_port,
    check_ports,
    check_shm,
    fixed_nbytes,
    has_package,
    inspect_machine,
    kv_budget,
    session_actors,
    standby_engines,
)

GB = 10**9
CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """8 GiB, of which 6 are available."""
    folder = tmp_path / "proc"
    write(folder, "meminfo", f"MemTotal: {8 * 2**20} kB\nMemFree: 5 kB\nMemAvailable: {6 * 2**20} kB\n")
    write(folder, "cpuinfo", "flags\t\t: fpu avx2 avx512f\n")
    return folder


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_cgroup_it_is_the_machines(proc: Path, cgroup: Path) -> None:
    machine = inspect_machine(proc, cgroup)
    assert machine == Machine(CORES, 8 * 2**30, 6 * 2**30, "AVX-512")


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_cgroups_limit_is_the_memory(limit: str, used: str, proc: Path, cgroup: Path) -> None:
    write(cgroup, limit, f"{4 * 2**30}\n")
    write(cgroup, used, f"{2**30}\n")
    machine = inspect_machine(proc, cgroup)
    assert (machine.memory_nbytes, machine.available_nbytes) == (4 * 2**30, 3 * 2**30)
    # The machine itself may have less to give.
    write(cgroup, used, "0")
    write(proc, "meminfo", f"MemTotal: {8 * 2**20} kB\nMemAvailable: {2**20} kB\n")
    assert inspect_machine(proc, cgroup).available_nbytes == 2**30


@pytest.mark.parametrize(
    ("folder", "line"), [("", "inactive_file"), ("memory/", "inactive_file 5\ntotal_inactive_file")]
)
def test_unused_file_pages_are_available(folder: str, line: str, proc: Path, cgroup: Path) -> None:
    """What packing a model has read and written stays in the cgroup's count until somebody needs the memory."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if folder else ("memory.max", "memory.current")
    write(cgroup, folder + names[0], str(4 * 2**30))
    write(cgroup, folder + names[1], str(3 * 2**30))
    write(cgroup, f"{folder}memory.stat", f"anon 17\nfile 18\n{line} {2**30}\n")
    assert inspect_machine(proc, cgroup).available_nbytes == 2 * 2**30


@pytest.mark.parametrize("limit", ["max", str(2**63), ""])
def test_no_limit(limit: str, proc: Path, cgroup: Path) -> None:
    write(cgroup, "memory.max", limit)
    assert inspect_machine(proc, cgroup).memory_nbytes == 8 * 2**30


def test_a_cgroup_over_its_limit_has_nothing_left(proc: Path, cgroup: Path) -> None:
    write(cgroup, "memory.max", str(2**30))
    write(cgroup, "memory.current", str(2**30 + 4096))
    assert inspect_machine(proc, cgroup).available_nbytes == 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "max 100000"}, CORES),
        ({"cpu.max": f"{CORES * 900000} 100000"}, CORES),
        ({"cpu.max": "nonsense"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
    ],
)
def test_cores_are_what_the_quota_allows(files: dict[str, str], cores: int, proc: Path, cgroup: Path) -> None:
    for name, text in files.items():
        write(cgroup, name, text)
    assert inspect_machine(proc, cgroup).cores == cores


@pytest.mark.parametrize(("controller", "prefix"), [("0::", ""), ("4:memory:", "memory/")])
def test_the_tightest_cgroup_above_this_process_counts(controller: str, prefix: str, proc: Path, cgroup: Path) -> None:
    """A service manager's limit is on the service, not on what is mounted; a limit may also be further up."""
    write(proc, "self/cgroup", f"9:name=systemd:/elsewhere\n{controller}/app.slice/phi.service\n")
    limit, used = ("limit_in_bytes", "usage_in_bytes") if prefix else ("max", "current")
    for place, allowed, taken in (("app.slice/phi.service", 6, 1), ("app.slice", 4, 1), ("elsewhere", 1, 1)):
        write(cgroup, f"{prefix}{place}/memory.{limit}", str(allowed * 2**30))
        write(cgroup, f"{prefix}{place}/memory.{used}", str(taken * 2**30))
    machine = inspect_machine(proc, cgroup)
    assert (machine.memory_nbytes, machine.available_nbytes) == (4 * 2**30, 3 * 2**30)
    # Whichever has least left, not whichever is smallest.
    write(cgroup, f"{prefix}app.slice/phi.service/memory.{used}", str(5 * 2**30))
    machine = inspect_machine(proc, cgroup)
    assert (machine.memory_nbytes, machine.available_nbytes) == (4 * 2**30, 2**30)


def test_a_containers_own_cgroup_is_what_is_mounted(proc: Path, cgroup: Path) -> None:
    """The path may be the host's."""
    write(proc, "self/cgroup", "0::/docker/0123456789ab\n")
    write(cgroup, "memory.max", str(2**30))
    write(cgroup, "cpu.max", "100000 100000")
    machine = inspect_machine(proc, cgroup)
    assert (machine.memory_nbytes, machine.cores) == (2**30, 1)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "AMX bf16"),
        ("avx2 avx512f avx512_bf16", "AVX-512 bf16"),
        ("avx2", "AVX2"),
        ("fp asimd", "NEON"),
        ("", "no vector instructions"),
    ],
)
def test_instructions_in_words(flags: str, name: str, proc: Path, cgroup: Path) -> None:
    write(proc, "cpuinfo", f"flags : {flags}\n")
    assert inspect_machine(proc, cgroup).instructions == name


def test_this_machine_can_be_inspected() -> None:
    machine = inspect_machine()
    assert 1 <= machine.cores <= CORES
    assert 0 <= machine.available_nbytes <= machine.memory_nbytes
    check_platform()


# Configuration.


@pytest.fixture(autouse=True)
def _no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    return Config(
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "deep" / "cache",
        server=ServerConfig(port=ports[0], metrics_port=ports[1]),
    )


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """As HAProxy does: with SO_REUSEPORT, so that a second one could share the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


MACHINE = Machine(2, 8 * GB, 8 * GB, "AVX2")


def refusal(config: Config, shm: Path = Path("/dev/shm")) -> str:
    with pytest.raises(StartError) as caught:
        check_config(config, MACHINE, shm)
    assert "\n" not in caught.value.message
    return caught.value.message


def with_server(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"server": config.server.model_copy(update=changes)})


def test_a_good_configuration_passes_and_its_folders_are_private(config: Config) -> None:
    check_config(config, MACHINE)
    for path in (config.state_path, config.cache_path):
        assert path.stat().st_mode & 0o777 == 0o700
        assert list(path.iterdir()) == []
    check_config(config, MACHINE)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_without_keys_only_loopback_is_served(host: str, config: Config) -> None:
    told = refusal(with_server(config, host=host))
    assert told.startswith(f"server.host: {host} would serve without API keys")


def test_traces_want_their_package(config: Config) -> None:
    traced = config.model_copy(update={"tracing": TracingConfig(endpoint="http://127.0.0.1:4318/v1/traces")})
    check_config(traced, MACHINE)
    with pytest.raises(StartError, match=re.escape("pip install 'phi-cluster[otel]'")):
        check_config(traced, MACHINE, has_package=lambda name: False)
    check_config(config, MACHINE, has_package=lambda name: False)
    assert has_package("opentelemetry.sdk")
    assert not has_package("no_such_package.inside")


def test_with_keys_others_are_served(config: Config, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: []")
    check_config(with_server(config, host="0.0.0.0", keys=keys), MACHINE)
    keys.write_text("keys: [{name: a}]")
    told = refusal(with_server(config, host="0.0.0.0", keys=keys))
    assert told == f"{keys}: keys.0.hash: Field required"
    assert refusal(with_server(config, keys=tmp_path / "none")).startswith("cannot read the keys in ")


def test_a_taken_port_is_named(config: Config, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    check_ports(config)
    with pytest.raises(StartError, match=re.escape(f"server.port: cannot listen on 127.0.0.1:{port} (Addre")):
        check_ports(with_server(config, port=port))
    with pytest.raises(StartError, match=re.escape("server.metrics_port: ")):
        check_ports(with_server(config, metrics_port=port))
    nodes = config.nodes.model_copy(update={"address": "127.0.0.1", "port": port})
    with pytest.raises(StartError, match=re.escape("nodes.port: ")):
        check_ports(config.model_copy(update={"nodes": nodes}))
    with pytest.raises(StartError, match="name: cannot listen"):
        check_port("name", "127.0.0.1", port)


def test_a_port_that_was_just_closed_is_free(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)), listener.accept()[0] as accepted:
        # Whoever closes first keeps the connection in TIME_WAIT.
        accepted.close()
    listener.close()
    check_port("name", "127.0.0.1", port)


def test_one_port_for_both_is_refused(config: Config) -> None:
    told = refusal(with_server(config, metrics_port=config.server.port))
    assert told == f"server.metrics_port: {config.server.port} is server.port too; choose another port"


def test_a_ray_that_was_started_otherwise_is_not_joined(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "unset RAY_ADDRESS, or say --address auto" in refusal(config)


def test_shared_memory_must_be_there(config: Config, tmp_path: Path) -> None:
    assert "mount a tmpfs" in refusal(config, tmp_path / "none")


def test_a_folder_that_cannot_be_written_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = refusal(config.model_copy(update={"cache_dir": tmp_path / "file" / "cache"}))
    assert told.startswith(f"cache_dir: cannot write to {tmp_path}/file/cache (Not a directory")
    with pytest.raises(StartError, match="state_dir: cannot write to /proc/phi"):
        check_folder("state_dir", Path("/proc/phi"))


# Memory.


def test_the_budget_is_half_of_what_is_left() -> None:
    fixed = fixed_nbytes(Config(replicas=2), GB)
    # The object store with the weights, whole.
    assert fixed > GB / 0.7 + PROCESSES_NBYTES + 2 * ENGINE_NBYTES
    machine = Machine(2, 16 * GB, 10 * GB, "AVX2")
    assert kv_budget(Config(replicas=2), machine, GB) == (10 * GB - fixed) // 2


def test_a_configured_budget_is_taken_if_it_fits() -> None:
    machine = Machine(2, 16 * GB, 10 * GB, "AVX2")
    fixed = fixed_nbytes(Config(), 0)
    fits = 10 * GB - fixed
    assert kv_budget(Config(kv=KVConfig(budget=fits)), machine, 0) == fits
    with pytest.raises(StartError, match=r"lower kv\.budget"):
        kv_budget(Config(kv=KVConfig(budget=fits + 1)), machine, 0)


@pytest.mark.parametrize(
    ("available", "budget"), [(0, None), (fixed_nbytes(Config(), 0) + 2**25, None), (16 * GB, 10**6)]
)
def test_too_little_memory_says_how_much_is_there_and_needed(available: int, budget: int | None) -> None:
    machine = Machine(2, 16 * GB, available, "AVX2")
    with pytest.raises(StartError) as caught:
        kv_budget(Config(kv=KVConfig(budget=budget)), machine, 0)
    told = caught.value.message
    assert told.startswith(f"too little memory: {available // 10**6} MB are available")
    assert f"take {fixed_nbytes(Config(), 0) // 10**6} MB and the KV cache 33 MB" in told


def test_weights_must_fit_into_shared_memory() -> None:
    with pytest.raises(StartError, match=r"/dev/shm has \d+ MB free, .*the weights needs? \d{12} MB there; enlarge"):
        check_shm(5 * 10**17)


@pytest.mark.parametrize("replicas", [1, 3])
def test_each_replica_has_a_standby_engine_if_all_fit(replicas: int) -> None:
    config = Config(replicas=replicas)
    needed = GB + fixed_nbytes(config, GB) + replicas * STANDBY_ENGINE_NBYTES
    assert standby_engines(config, Machine(2, 99 * GB, needed, "AVX2"), GB, GB) == 1
    assert standby_engines(config, Machine(2, 99 * GB, needed - 1, "AVX2"), GB, GB) == 0


@pytest.mark.parametrize(("left", "actors"), [(100 * SESSION_ACTOR_NBYTES, 64), (5 * SESSION_ACTOR_NBYTES, 5), (-1, 0)])
def test_session_actors_are_as_many_as_fit(left: int, actors: int) -> None:
    fixed = fixed_nbytes(Config(replicas=2), GB) + 2 * STANDBY_ENGINE_NBYTES + 2 * GB
    # A tenth of the machine stays free.
    machine = Machine(2, 20 * GB, fixed + 2 * GB + left, "AVX2")
    assert session_actors(Config(replicas=2), machine, GB, 2 * GB, 1) == actors
    few = Config(replicas=2, sessions=SessionsConfig(max_actors=3))
    assert session_actors(few, machine, GB, 2 * GB, 1) == min(actors, 3)


def test_asked_for_standby_engines_must_fit() -> None:
    config = Config(engine=EngineConfig(standby_engines=2))
    needed = fixed_nbytes(config, 0) + 2 * STANDBY_ENGINE_NBYTES
    assert standby_engines(config, Machine(2, 99 * GB, needed, "AVX2"), 0, 0) == 2
    with pytest.raises(StartError, match=r"2 for each replica take 800 MB, and 799 MB are left after"):
        standby_engines(config, Machine(2, 99 * GB, needed - 10**6, "AVX2"), 0, 0)
    none = Config(engine=EngineConfig(standby_engines=0))
    assert standby_engines(none, Machine(2, 99 * GB, 0, "AVX2"), 0, 0) == 0


def test_no_engine_stands_by_on_a_gpu() -> None:
    machine = Machine(2, 99 * GB, 99 * GB, "AVX2")
    assert standby_engines(Config(device="cuda"), machine, 0, 0) == 0
    with pytest.raises(StartError, match="the GPU's memory"):
        standby_engines(Config(device="cuda", engine=EngineConfig(standby_engines=1)), machine, 0, 0)


# Several machines.


def test_several_machines_reach_each_others_replicas(config: Config, tmp_path: Path) -> None:
    nodes = config.model_copy(update={"nodes": NodesConfig(ray_address="auto")})
    assert refusal(nodes).endswith("set server.keys, and server.host: 0.0.0.0")
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: []")
    check_config(with_server(nodes, host="0.0.0.0", keys=keys), MACHINE)


def test_a_machine_that_joins_is_looked_at_first(config: Config, listener: socket.socket, tmp_path: Path) -> None:
    check_node(config, 0)
    with pytest.raises(StartError, match=r"server\.port: cannot listen"):
        check_node(with_server(config, port=listener.getsockname()[1]), 0)
    with pytest.raises(StartError, match=r"the weights needs \d+ MB there"):
        check_node(config, 5 * 10**17)
    with pytest.raises(StartError, match="cannot read the keys"):
        check_node(with_server(config, keys=tmp_path / "none"), 0)
