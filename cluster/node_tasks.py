"""What is done on a node of the cluster at the controller's wish: its actors are started, a process there is ended.

Owns: these tasks, and the node's own keeper and weight store, once there. Knows nothing of who decides it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phi_cluster.cluster.actors import NAMESPACE, create, detached_options, keeper_names, weight_store_name
from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import KeeperMoved, StartError
from phi_cluster.cluster.keys import KeyFile
from phi_cluster.cluster.logs import log_as
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.model_transfer import fetch_packed, received_folder, store_files
from phi_cluster.cluster.node_plan import NodePlan, plan_node
from phi_cluster.cluster.preflight import SPILL_SHARE, check_folder, inspect_machine, object_store_nbytes
from phi_cluster.cluster.processes import kill_for_sure
from phi_cluster.cluster.ray_environment import environment
from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE, current_runtime_dir, open_runtime_dir
from phi_cluster.cluster.served_model import ServedModel, choose_dtypes
from phi_cluster.cluster.session.journals import JournalPlace
from phi_cluster.cluster.session.keeper_actor import Keeper
from phi_cluster.cluster.weight_store import WeightStore, packed_paths

# An actor of a node that has just been lost may still have its name.
_START_SECONDS = 300.0


def node_actors(node_id: str, served: ServedModel, config: Config, plan: NodePlan) -> tuple[Any, Any]:
    """The weight store and the keeper of a node, which is this one: they begin with their work when they are asked."""
    store = create(
        WeightStore,
        detached_options(weight_store_name(node_id), node_id),
        served,
        config.cache_path,
        plan.num_standbys,
    )
    name = keeper_names(node_id)[0]
    keeper = create(
        Keeper,
        detached_options(name, node_id),
        served.layout,
        served.fingerprint,
        JournalPlace(config.state_path, config.journal),
        config.sessions.model_copy(update={"max_actors": plan.num_session_actors}),
        config.kv,
        plan.budget_nbytes,
        name,
    )
    return store, keeper


def start_keeper(keeper: Any, seconds: float = 10.0) -> None:
    """Waits for the end of one that an earlier server of the same state directory had, which may just be dying. Raises
    KeeperMoved, RayError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            ray.get(keeper.start.remote(), timeout=_START_SECONDS)
            return
        except KeeperMoved:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


async def start_node(node_id: str, source_node_id: str, served: ServedModel, config: Config) -> list[str]:
    """Starts the actors of a node that has joined, with the model as `source_node_id` has it. Returns what is to be
    noted. Raises StartError."""
    return await _start_node.options(**_on(node_id)).remote(node_id, source_node_id, served, config)


async def end_process(node_id: str, process: ProcessId) -> None:
    """Kills a process of that node and returns once it is dead. Raises RayError."""
    await _end_process.options(**_on(node_id)).remote(process)


def _on(node_id: str) -> dict[str, Any]:
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def check_nodes(config: Config, weights_nbytes: int) -> None:
    """On a Ray that somebody else has started: whether its nodes are such as we start them. Raises StartError."""
    names = list(environment(config, Path(), ""))
    for node in ray.nodes():
        if node["Alive"]:
            name = f"node {node['NodeID'][:12]} ({node['NodeManagerAddress']})"
            given = ray.get(_environment.options(**_on(node["NodeID"])).remote(names))
            check_environment(name, config, given)
            check_object_store(name, int(node["Resources"].get("object_store_memory", 0)), weights_nbytes)
    for node in ray.nodes():
        if node["Alive"]:
            ray.get(_open_runtime_dir.options(**_on(node["NodeID"])).remote())


def check_environment(node: str, config: Config, given: Mapping[str, str]) -> None:
    """`given`: of what is asked for, what the node's workers have in their environment. Raises StartError."""
    wanted = environment(config, Path(given.get(RUNTIME_DIR_VARIABLE) or "/tmp/phi"), "")
    # Ray's own check of its token has let us in.
    del wanted["RAY_AUTH_TOKEN"]
    missing = sorted(name for name, value in wanted.items() if given.get(name) != value)
    if missing:
        raise StartError(
            f"{node} of this Ray was started without {missing[0]}={wanted[missing[0]]} ({len(missing)} settings "
            "differ): start its nodes with what `phi-cluster environment CONFIG` prints"
        )


def check_object_store(node: str, nbytes: int, weights_nbytes: int) -> None:
    """Raises StartError if the weights find no room there."""
    # Ray counts some of it for itself.
    if nbytes < weights_nbytes / SPILL_SHARE:
        raise StartError(
            f"{node} of this Ray has an object store of {nbytes // 10**6} MB, too little for the weights "
            f"({weights_nbytes // 10**6} MB): start its nodes with "
            f"--object-store-memory={object_store_nbytes(weights_nbytes)}"
        )


@ray.remote
def _environment(names: list[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


@ray.remote
def _open_runtime_dir() -> None:
    open_runtime_dir(current_runtime_dir())


@ray.remote
def _end_process(process: ProcessId) -> None:
    asyncio.run(kill_for_sure(process))


@ray.remote
def _start_node(node_id: str, source_node_id: str, served: ServedModel, config: Config) -> list[str]:
    log_as("node_start")
    notes: list[str] = []
    # Of a node that we have not started it may not be there, or not be private.
    open_runtime_dir(current_runtime_dir())
    for name, path in (("state_dir", config.state_path), ("cache_dir", config.cache_path)):
        check_folder(name, path)
    (config.state_path / "sessions").mkdir(mode=0o700, exist_ok=True)
    if config.keys_path is not None:
        # Replicas here read it too.
        KeyFile(config.keys_path)
    if choose_dtypes(config.model_copy(update={"dtype": served.dtype})).weights != served.dtype:
        raise StartError(f"dtype: {served.dtype} cannot be computed on this node")
    source = ray.get_actor(weight_store_name(source_node_id), namespace=NAMESPACE)
    served = with_folder(served, config.cache_path, source)
    weights_nbytes = packed_paths(served, config.cache_path)[0].stat().st_size
    machine = inspect_machine()
    # Ray's object store has its pages already.
    available = machine.available_nbytes + object_store_nbytes(weights_nbytes)
    plan = plan_node(config, replace(machine, available_nbytes=available), weights_nbytes, notes.append)
    store, keeper = node_actors(node_id, served, config, plan)
    ray.get(store.weights.remote(), timeout=_START_SECONDS)
    start_keeper(keeper)
    return notes


def with_folder(served: ServedModel, cache_path: Path, source: Any) -> ServedModel:
    """The model as it is on this node."""
    folder = received_folder(cache_path, served.fingerprint)
    if not folder.is_dir():
        store_files(ray.get(source.files.remote()), folder)
    paths = packed_paths(served, cache_path)
    if not all(path.exists() for path in paths):
        fetch_packed(_RaySource(source), ray.get(source.sizes.remote()), paths)
    return replace(served, folder=folder)


class _RaySource:
    """The weight store of another node; its pieces come through the object store (model_transfer.Source)."""

    def __init__(self, store: Any):
        self._store = store

    def ask(self, of_index: bool, offset: int, nbytes: int) -> Any:
        return self._store.piece.remote(of_index, offset, nbytes)

    def get(self, asked: Any) -> tuple[Any, int]:
        piece, checksum = ray.get(asked)
        return piece, checksum
