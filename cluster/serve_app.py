"""The server as an application that Serve builds by itself, of `import_path` and `args` (KubeRay's RayService, `serve
deploy`): what `phi-cluster serve --address` does, without a process that stays.

Owns: that way in. Knows nothing of what Serve was started with (its `http_options` are in the same file), and of how
the application ends: with its Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from phi_cluster.cluster.config import load_config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.head_start import start_on_head
from phi_cluster.cluster.preparation import Prepared
from phi_cluster.cluster.replica import Replica
from phi_cluster.cluster.serve_cluster import application


def build(args: dict[str, Any]) -> Any:
    """The application, once the head has all that it needs. `args`: `config`, a YAML file that is on the head and here.

    Idempotent: Serve builds again when it is told of a change. Raises StartError, also as RayTaskError.
    """
    if set(args) != {"config"}:
        raise StartError(f"args: expected config: /path/of/config.yaml, not {', '.join(sorted(args)) or 'nothing'}")
    config = load_config(Path(args["config"]), {"nodes": {"ray_address": "auto"}})
    prepared: Prepared = ray.get(start_on_head(config))
    # Nobody stays who would start the head's part again after a head that was lost: the replicas do.
    arguments = (prepared.served, config, prepared.num_threads, prepared.plan.num_standbys, True)
    return application(Replica, config, prepared.num_threads, *arguments)
