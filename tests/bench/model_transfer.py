"""How a model comes to another node: from the node that has it, through Ray, or packed there from the checkpoint.

    python -m tests.bench.model_transfer [--model smollm2] [--dtype int8] [--gbits 1 10]

As root, with Debian's iproute2: two raylets in network namespaces of their own, over a link that `tc` shapes (see
moving.py). What is timed is what a machine that joins does: the small files, the packed weights in checked pieces into
a file of its cache, and their publication in its object store; against packing the checkpoint that lies on its disk,
and publishing that. The last line is JSON.

Owns: the order and the clock. Knows nothing of how it is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.moving import ROOT, TIMEOUT_SECONDS, Link, connected, environment, raylets

ROUNDS = 3
OBJECT_STORE_NBYTES = 900 * 10**6


def fetch(served: Any, source: Any, folder: Path) -> float:
    """Seconds, on the node that wants it."""
    import numpy as np
    import ray

    from phi_cluster.cluster.node_tasks import with_folder
    from phi_cluster.cluster.weight_store import packed_paths

    began = time.perf_counter()
    here = with_folder(served, folder, source)
    ray.put(np.memmap(packed_paths(here, folder)[0], dtype=np.uint8, mode="r"))
    return time.perf_counter() - began


def pack(served: Any, folder: Path) -> float:
    """Seconds, from the checkpoint."""
    import numpy as np
    import ray

    from phi_cluster.cluster.weight_store import ensure_packed

    began = time.perf_counter()
    ray.put(np.memmap(ensure_packed(served, folder)[0], dtype=np.uint8, mode="r"))
    return time.perf_counter() - began


def inside(asked: dict[str, Any]) -> None:
    """In the first namespace."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from phi_cluster.cluster.config import Config
    from phi_cluster.cluster.served_model import describe_model
    from phi_cluster.cluster.weight_store import WeightStore, ensure_packed
    from phi_cluster.model.hub import resolve_model

    folder = Path(asked["folder"])
    os.chdir(folder)
    link = Link.__new__(Link)
    link.__dict__.update(asked["link"])
    here, there = (
        {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        for node in connected()
    )
    config = Config(model=asked["model"], dtype=asked["dtype"])
    model = resolve_model(config.model, config.cache_path, lambda event: None, None)
    served = describe_model(config, model, noted=lambda text: None)
    weights, _ = ensure_packed(served, config.cache_path)
    store = WeightStore.options(**here).remote(served, config.cache_path, 0)  # type: ignore[attr-defined]
    ray.get(store.sizes.remote())
    on_other = ray.remote(fetch).options(**there), ray.remote(pack).options(**there)
    rows = []
    for gbits in asked["gbits"]:
        link.shape(gbits)
        seconds = [ray.get(on_other[0].remote(served, store, folder / f"to-{gbits}-{i}")) for i in range(ROUNDS)]
        rows.append({"gbits": gbits, "seconds": statistics.median(seconds)})
    seconds = [ray.get(on_other[1].remote(replace(served), folder / f"packed-{i}")) for i in range(ROUNDS)]
    found = {"nbytes": weights.stat().st_size, "packing_seconds": statistics.median(seconds), "fetched": rows}
    print(json.dumps(found), flush=True)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=["int8", "int4", "bfloat16"], default="int8")
    parser.add_argument("--gbits", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.inside:
        inside(json.loads(parsed.inside))
        return
    os.environ.update(environment())
    link = Link()
    # Sockets' paths are short.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m") as name:
        try:
            with raylets(link, Path(name), OBJECT_STORE_NBYTES):
                asked = {key: getattr(parsed, key) for key in ("model", "dtype", "gbits")}
                asked |= {"folder": name, "link": link.__dict__}
                command = [
                    *link.within(link.names[0]),
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "tests.bench.model_transfer",
                ]
                command += ["--inside", json.dumps(asked)]
                done = subprocess.run(
                    command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_SECONDS
                )
        finally:
            link.close()
    # Ray prints to the same place.
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith(("[", "{"))][-1])
    print(f"{found['nbytes'] / 1e6:.0f} MB; packed from the checkpoint in {found['packing_seconds']:.2f} s")
    for one in found["fetched"]:
        print(f"{one['gbits']:>4g} Gbit/s: {one['seconds']:.2f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
