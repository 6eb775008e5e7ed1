"""The server as an application that Serve builds by itself, of `import_path` and `args` (KubeRay's RayService, `serve
deploy`): what `phi-cluster serve --address` does, without a process that stays.

Owns: that way in. Knows nothing of what Serve was started with (its `http_options` are in the same file), and of how
the application ends: with its Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phi_cluster.cluster.config import Config, load_config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.head import claim, start_head_again
from phi_cluster.cluster.node_tasks import check_nodes
from phi_cluster.cluster.preparation import Prepared, prepare
from phi_cluster.cluster.replica import Replica
from phi_cluster.cluster.report import Report
from phi_cluster.cluster.runtime_dir import current_runtime_dir
from phi_cluster.cluster.serve_cluster import application

_HEAD_RESOURCE = "node:__internal_head__"


def build(args: dict[str, Any]) -> Any:
    """The application, once the head has all that it needs. `args`: `config`, a YAML file that is on the head and here.

    Idempotent: Serve builds again when it is told of a change. Raises StartError.
    """
    if set(args) != {"config"}:
        raise StartError(f"args: expected config: /path/of/config.yaml, not {', '.join(sorted(args)) or 'nothing'}")
    config = load_config(Path(args["config"]), {"nodes": {"ray_address": "auto"}})
    head = _head_node_id()
    on_head = NodeAffinitySchedulingStrategy(head, soft=False)
    prepared: Prepared = ray.get(_start.options(num_cpus=0, max_retries=0, scheduling_strategy=on_head).remote(config))
    arguments = (prepared.served, config, prepared.num_threads, prepared.plan.num_standbys)
    return application(Replica, config, prepared.num_threads, *arguments)


@ray.remote
def _start(config: Config) -> Prepared:
    prepared = prepare(config, Report(), serves=True)
    check_nodes(config, prepared.weights_nbytes)
    claim(prepared)
    start_head_again(prepared, ray.get_runtime_context().get_node_id(), current_runtime_dir())
    return prepared


def _head_node_id() -> str:
    for node in ray.nodes():
        if node["Alive"] and _HEAD_RESOURCE in node["Resources"]:
            return str(node["NodeID"])
    raise StartError("this Ray has no head")
