"""A process with a Ray cluster of two nodes on this machine, each with a keeper and a replica, behind no proxy.

Owns: starting and ending it, and killing its second node. What is said there is said to the replicas' own ports, so that
a test decides which node a request comes to. Run as a program: it prints a line of JSON when all is up, and obeys words
on its standard input. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    from phi_cluster.cluster.config import Config
    from phi_cluster.cluster.ray_environment import set_environment

    config = Config.model_validate(settings)
    with tempfile.TemporaryDirectory(prefix="phi-two-") as folder:
        runtime_dir = Path(folder)
        set_environment(config, runtime_dir)
        run(config, runtime_dir)


def run(config: Any, runtime_dir: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from phi_cluster.cluster import serve_cluster
    from phi_cluster.cluster.actors import (
        CONTROLLER,
        NAMESPACE,
        create,
        detached_options,
        keeper_name,
        weight_store_name,
    )
    from phi_cluster.cluster.controller import Controller
    from phi_cluster.cluster.replica import Replica
    from phi_cluster.cluster.served_model import describe_model
    from phi_cluster.cluster.session.journals import JournalPlace
    from phi_cluster.cluster.session.keeper import Keeper
    from phi_cluster.cluster.weight_store import WeightStore, ensure_packed
    from phi_cluster.model.hub import resolve_model

    folder = resolve_model(config.model, config.cache_path, lambda event: None, None)
    served = describe_model(config, folder, noted=lambda text: None)
    nbytes = ensure_packed(served, config.cache_path, lambda done, total: None)[0].stat().st_size
    node = {"num_cpus": 1, "object_store_memory": 2 * nbytes, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": str(runtime_dir / "ray")})
    second = cluster.add_node(num_cpus=1, object_store_memory=2 * nbytes)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    try:
        head_id = ray.get_runtime_context().get_node_id()
        starting = []
        for one in (head_id, second.node_id):
            store = create(
                WeightStore, detached_options(weight_store_name(one), one), served, config.cache_path
            )
            keeper = create(
                Keeper,
                detached_options(keeper_name(one), one),
                served.layout,
                served.fingerprint,
                JournalPlace(config.state_path / one[:8], config.journal),
                config.sessions,
                config.kv,
                512 * 2**20,
            )
            starting += [store.weights.remote(), keeper.start.remote()]
        controller = create(Controller, detached_options(CONTROLLER, head_id), config, nbytes, {}, runtime_dir)
        ray.get([*starting, controller.start.remote()])
        serve_cluster.start_serve(config)
        serve_cluster.run_app(Replica, config, 1, served, config, runtime_dir, 1, 0)
        replicas: list[Any] = []
        while len({one.node_id for one in replicas}) < 2:
            time.sleep(0.2)
            replicas = list(ray.get(controller.peers.remote()).replicas)
        addresses = {("head" if one.node_id == head_id else "second"): one.address for one in replicas}
        print(json.dumps({"addresses": addresses, "head": head_id, "second": second.node_id}), flush=True)
        for line in sys.stdin:
            if line.strip() == "kill":
                cluster.remove_node(second, allow_graceful=False)
                print("killed", flush=True)
            else:
                break
    finally:
        serve_cluster.stop_serve(1.0)
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
