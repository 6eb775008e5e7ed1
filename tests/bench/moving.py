"""A session moved from one node to another over links of different speeds, against computing it again.

    python -m tests.bench.moving --tokens 64 256 1024 4096 --gbits 1 10
    python -m tests.bench.moving --shape smollm2 --tokens 1024

As root, with Debian's iproute2 and redis-server. Two raylets, each with a real keeper, run in network namespaces of
their own, joined by a veth pair that `tc` shapes (a token bucket at both ends); what a plain socket carries over it is
measured first. The journal is in a Redis on a Unix socket, which the link does not slow down. A session of so many
tokens, of random keys and values, moves there and back; the time is that of the call, and the bytes are compared.
Computing is measured here, if it is not given: a network of that shape with random weights fills a segment, alone on
all cores. The last line is JSON.

Owns: the namespaces, the link, the order, and the clock. Knows nothing of how a session moves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.redis_process import RedisProcess

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6399
OBJECT_STORE_NBYTES = 300 * 10**6
MAX_MODEL_LEN = 8192
ROUNDS = 3
TIMEOUT_SECONDS = 480.0
# Layers, heads that have keys and values, numbers in each.
KV_SHAPES = {"phi-3-mini": (32, 32, 96), "smollm2": (30, 3, 64)}
NETWORKS: dict[str, dict[str, Any]] = {
    "phi-3-mini": {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": MAX_MODEL_LEN,
        "original_max_position_embeddings": MAX_MODEL_LEN,
    },
    "smollm2": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": MAX_MODEL_LEN,
        "original_max_position_embeddings": MAX_MODEL_LEN,
        "rope_theta": 100_000.0,
    },
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Link:
    """Two namespaces and what joins them. Gone with `close`, and with it all processes in them."""

    def __init__(self) -> None:
        self.names = [f"phi{os.getpid()}{side}" for side in "ab"]
        self._ends = [f"v{os.getpid()}{side}" for side in "ab"]
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
        for name, end, address in zip(self.names, self._ends, ADDRESSES, strict=True):
            run("ip", "link", "set", end, "netns", name)
            run(*self.within(name), "ip", "addr", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                run(*self.within(name), "ip", "link", "set", device, "up")

    @staticmethod
    def within(name: str) -> list[str]:
        return ["ip", "netns", "exec", name]

    def shape(self, gbits: float) -> None:
        """As a bucket that holds two milliseconds of it."""
        burst = max(int(gbits * 1e9 / 8 * 0.002), 2**18)
        for name, end in zip(self.names, self._ends, strict=True):
            shape = ["rate", f"{round(gbits * 1000)}mbit", "burst", str(burst), "latency", "50ms"]
            run(*self.within(name), "tc", "qdisc", "replace", "dev", end, "root", "tbf", *shape)

    def goodput(self, seconds: float = 1.0) -> float:
        """Bytes a second of a plain socket."""
        receive = (
            "import socket,time\ns=socket.create_server(('', 5999)); print('up', flush=True); c=s.accept()[0]\n"
            "b=bytearray(1<<20); n=c.recv_into(b); t=time.perf_counter(); k=0\n"
            "while n:=c.recv_into(b): k+=n\nprint(k/(time.perf_counter()-t))"
        )
        send = (
            "import socket,time,sys\nc=socket.create_connection((sys.argv[1], 5999)); b=bytes(1<<20)\n"
            "t=time.perf_counter()\nwhile time.perf_counter()-t<float(sys.argv[2]): c.sendall(b)"
        )
        receiving = [*self.within(self.names[1]), sys.executable, "-c", receive]
        with subprocess.Popen(receiving, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            run(*self.within(self.names[0]), sys.executable, "-c", send, ADDRESSES[1], str(seconds))
            return float(receiver.stdout.readline())

    def close(self) -> None:
        for name in self.names:
            for number in (signal.SIGTERM, signal.SIGKILL):
                for _ in range(50):
                    found = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
                    pids = [int(pid) for pid in found.stdout.split()]
                    for pid in pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, number)
                    if not pids:
                        break
                    time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def raylets(link: Link, folder: Path, object_store_nbytes: int = OBJECT_STORE_NBYTES) -> Iterator[None]:
    """One in each namespace; the first is the head."""
    command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2"]
    command += [f"--object-store-memory={object_store_nbytes}", "--disable-usage-stats"]
    roles = (
        ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"],
        [f"--address={ADDRESSES[0]}:{PORT}"],
    )
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, address, role in zip(link.names, ADDRESSES, roles, strict=True):
            call = [*link.within(name), *command, *role, f"--node-ip-address={address}"]
            with (folder / f"{name}.log").open("w") as log:
                started.append(subprocess.Popen(call, stdout=log, stderr=log, cwd=folder))
            if len(started) == 1:
                wait_for_head(link)
        yield
    except BaseException:
        for log_path in folder.glob("*.log"):
            print(log_path.read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20.0)


def wait_for_head(link: Link) -> None:
    """Until its port answers."""
    probe = f"import socket; socket.create_connection(('{ADDRESSES[0]}', {PORT}), 1.0)"
    for _ in range(60):
        if not subprocess.run(
            [*link.within(link.names[0]), sys.executable, "-c", probe], capture_output=True
        ).returncode:
            return
        time.sleep(1.0)
    raise TimeoutError("the head did not come up")


def tokens_per_second(shape: str, num_tokens: int) -> float:
    """Of computing a prompt of so many tokens, on all cores."""
    hibernation = __import__("tests.bench.hibernation", fromlist=["Network"])
    threads = len(os.sched_getaffinity(0))
    network = hibernation.Network(threads, NETWORKS[shape], MAX_MODEL_LEN)
    segment = network.segment()
    try:
        # The first step touches the weights for the first time.
        network.fill(segment, 32)
        segment.clear()
        return num_tokens / float(network.fill(segment, num_tokens))
    finally:
        segment.close()


async def measure(nodes: list[Any], num_tokens: int) -> dict[str, float]:
    """Seconds of a move, and its bytes."""
    from phi_cluster.cluster.messages import SessionKey

    key = SessionKey("bench", f"{num_tokens}-{os.urandom(4).hex()}")
    await nodes[0].turn(key, "first ", list(range(num_tokens)))
    before = await nodes[0].memory(key, "first ")
    seconds = []
    here, there = nodes
    for _ in range(ROUNDS):
        began = time.perf_counter()
        assert await there.move_here(key, here), "it did not move"
        seconds.append(time.perf_counter() - began)
        assert await there.memory(key, "first ") == before, "other bytes came"
        here, there = there, here
    nbytes = sum(map(len, before))
    await here.keeper.delete.remote(key)
    return {"nbytes": nbytes, "seconds": statistics.median(seconds)}


def connected() -> list[dict[str, Any]]:
    """In the first namespace: Ray's view of both nodes, the head first."""
    import ray

    from phi_cluster.cluster.actors import NAMESPACE

    address = f"{ADDRESSES[0]}:{PORT}"
    deadline = time.monotonic() + 120.0
    while True:
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address=ADDRESSES[0],
            )
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(2.0)
    while len(alive := [node for node in ray.nodes() if node["Alive"]]) < 2:
        assert time.monotonic() < deadline, "the second node did not come"
        time.sleep(0.5)
    alive.sort(key=lambda node: ADDRESSES.index(node["NodeManagerAddress"]))
    return alive


def environment() -> dict[str, str]:
    """Of all processes in the namespaces."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(16).hex(),
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT),
    }


def inside(asked: dict[str, Any]) -> None:
    """In the first namespace: sessions of all sizes, once for each speed."""
    import ray

    from phi_cluster.cluster.session.segment_layout import SegmentLayout
    from phi_cluster.model.kv_layout import KVCacheLayout
    from tests.cluster.moving_nodes import Node

    folder = Path(asked["folder"])
    os.chdir(folder)
    link = Link.__new__(Link)
    link.__dict__.update(asked["link"])
    alive = connected()
    layers, heads, head_dim = KV_SHAPES[asked["shape"]]
    layout = SegmentLayout(KVCacheLayout(layers, heads, head_dim, MAX_MODEL_LEN, itemsize=2))
    nodes = [Node(node["NodeID"], layout, folder / node["NodeID"], asked["journal"]) for node in alive]

    async def all_of_them() -> list[dict[str, Any]]:
        # Processes start, and connections are made.
        await measure(nodes, 64)
        found = []
        for gbits in asked["gbits"]:
            link.shape(gbits)
            socket = link.goodput()
            for num_tokens in asked["tokens"]:
                one = await measure(nodes, num_tokens)
                found.append({"gbits": gbits, "socket_mb_s": round(socket / 1e6), "tokens": num_tokens, **one})
        return found

    print(json.dumps(asyncio.run(all_of_them())), flush=True)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(KV_SHAPES), default="phi-3-mini")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--gbits", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--compute", type=float, help="tokens a second of a prompt; default: measured here, with int8")
    parser.add_argument("--compute-tokens", type=int, default=256, help="measured over so many")
    parser.add_argument("--niceness", type=int, default=0, help="below 0: where other work runs on the machine")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.inside:
        inside(json.loads(parsed.inside))
        return
    os.environ.update(environment())
    if parsed.niceness:
        os.setpriority(os.PRIO_PROCESS, 0, parsed.niceness)
        # Linux weighs sessions first, and then processes within them.
        with contextlib.suppress(OSError):
            os.setsid()
            Path("/proc/self/autogroup").write_text(str(parsed.niceness))
    rate = parsed.compute or tokens_per_second(parsed.shape, parsed.compute_tokens)
    link = Link()
    # Sockets' paths are short.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m") as name:
        redis = RedisProcess(Path(name))
        try:
            with raylets(link, Path(name)):
                asked = {key: getattr(parsed, key) for key in ("shape", "tokens", "gbits")}
                asked |= {"folder": name, "journal": redis.url, "link": link.__dict__}
                command = [*link.within(link.names[0]), sys.executable, "-W", "ignore", "-m", "tests.bench.moving"]
                command += ["--inside", json.dumps(asked)]
                done = subprocess.run(
                    command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_SECONDS
                )
        finally:
            link.close()
            redis.kill()
    # Ray prints to the same place.
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith(("[", "{"))][-1])
    origin = "as given" if parsed.compute else f"measured over {parsed.compute_tokens} tokens"
    print(f"{parsed.shape}: {rate:.1f} tokens a second computed ({origin})")
    print(f"{'Gbit/s':>6} {'socket':>9} {'tokens':>6} {'MB':>7} {'moved':>9} {'MB/s':>6} {'computed':>9} {'times':>6}")
    for one in found:
        computed, megabytes = one["tokens"] / rate, one["nbytes"] / 1e6
        speeds = f"{one['seconds']:>8.3f}s {megabytes / one['seconds']:>6.0f} {computed:>8.2f}s"
        link_speed = f"{one['gbits']:>6g} {one['socket_mb_s']:>4} MB/s"
        print(f"{link_speed} {one['tokens']:>6} {megabytes:>7.1f} {speeds} {computed / one['seconds']:>6.1f}")
    print(json.dumps({"shape": parsed.shape, "tokens_per_second": rate, "moves": found}))


if __name__ == "__main__":
    main()
