"""All that is known before anything is started: machine, configuration, model, and what the node has room for.

Owns: the order of the checks, and fetching, converting and packing what is not in the cache yet. Knows nothing of Ray,
and of how it is started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.metadata import version

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.node_plan import NodePlan, plan_node
from phi_cluster.cluster.preflight import (
    Machine,
    check_config,
    check_platform,
    check_ports,
    check_shm,
    inspect_machine,
    object_store_nbytes,
)
from phi_cluster.cluster.report import Report
from phi_cluster.cluster.runtime_dir import clear_dead_servers
from phi_cluster.cluster.served_model import ServedModel, choose_dtypes, describe_model
from phi_cluster.cluster.session.hibernation_store import check_key
from phi_cluster.cluster.session.redis_server import check_server
from phi_cluster.cluster.weight_store import ensure_packed
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.model_cache import ProgressEvent
from phi_cluster.model.ops.library import ISA_VARIABLE
from phi_cluster.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has found out; `plan`: of this machine."""

    config: Config
    machine: Machine
    served: ServedModel
    weights_nbytes: int
    plan: NodePlan

    @property
    def shm_nbytes(self) -> int:
        """What Ray's object store takes of /dev/shm."""
        return object_store_nbytes(self.weights_nbytes)

    @property
    def num_threads(self) -> int:
        return self.config.engine.num_threads or max(self.machine.cores // self.config.replicas_per_node, 1)


def prepare(config: Config, report: Report, *, serves: bool = False) -> Prepared:
    """Checks machine, configuration and model, and fetches, converts and packs what is not in the cache yet. `serves`:
    Serve runs already, and so do its proxies, on our ports.

    Raises StartError with the one sentence that a user needs.
    """
    check_platform()
    for what in clear_dead_servers():
        report.cleared(what)
    machine = inspect_machine()
    check_config(config, machine)
    if not serves:
        check_ports(config)
    report.checked(machine)
    if config.kv.hibernate_key_file is not None:
        check_key(config.kv.hibernate_key_file)
    if config.journal is not None:
        for note in check_server(config.journal):
            report.noted(note)
    # What is wrong with the dtypes is said before a model is fetched for them.
    choose_dtypes(config)
    try:
        folder = resolve_model(
            config.model, config.cache_path, report.progress, config.hub_token or os.environ.get("HF_TOKEN")
        )
    except (ValueError, OSError) as error:
        raise StartError(str(error)) from None
    served = describe_model(config, folder, noted=report.noted)
    try:
        # Each replica loads it too; here what is wrong with it can still be said in one sentence.
        Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
        raise StartError(f"{config.model}: {error}") from None

    def packing(done: int, total: int) -> None:
        report.progress(ProgressEvent("packing", done, total, f"{served.names[0]} {served.dtype}"))

    weights, _ = ensure_packed(served, config.cache_path, packing)
    weights_nbytes = weights.stat().st_size
    if config.nodes.ray_address is None:
        check_shm(weights_nbytes)
        room = machine
    else:
        # The object store of a Ray that runs already has its pages.
        room = replace(machine, available_nbytes=machine.available_nbytes + object_store_nbytes(weights_nbytes))
    return Prepared(config, machine, served, weights_nbytes, plan_node(config, room, weights_nbytes, report.noted))


def build_info(prepared: Prepared) -> dict[str, str]:
    """Labels of phi_build_info."""
    served = prepared.served
    return {
        "version": version("phi-cluster"),
        "torch": version("torch"),
        "ray": version("ray"),
        "isa": os.environ.get(ISA_VARIABLE) or prepared.machine.instructions,
        "dtype": served.dtype,
        "kv_cache_dtype": served.kv_cache_dtype,
        "activation_dtype": served.activation_dtype,
        "model": served.names[0],
    }
