"""`phi-cluster join`, `drain` and `environment`: a machine joins a cluster, or a Ray that others start is told what it
needs, and that one of its machines leaves.

Owns: what is printed, and joining again when the cluster was away. Knows nothing of how a machine joins (join.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from phi_cluster.cluster.cluster_record import ClusterRecord
from phi_cluster.cluster.cluster_record import read as read_record
from phi_cluster.cluster.config import NodesConfig, load_config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.processes import forbid_core_dumps
from phi_cluster.cluster.ray_environment import environment, set_environment, shared_token
from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE, create_runtime_dir, remove_runtime_dir
from phi_cluster.cluster.session.redis_server import PASSWORD_VARIABLE
from phi_cluster.cluster.stop_signals import at_once, on_signals

# A machine whose cluster is away looks for it so often.
_AGAIN_SECONDS = 2.0


def run_join(parsed: argparse.Namespace) -> int:
    out = sys.stdout
    head = parsed.head if ":" in parsed.head else f"{parsed.head}:{NodesConfig().port}"
    token = shared_token(parsed.token_file)
    record = read_record(head, token)
    record.check_versions()
    runtime_dir = create_runtime_dir()
    try:
        with open(runtime_dir / "driver.log", "w") as log, contextlib.redirect_stdout(log):
            set_environment(record.loaded_config(), runtime_dir, token)
            if record.password is not None:
                os.environ[PASSWORD_VARIABLE] = record.password
            forbid_core_dumps()
            return _run_node(record, head, token, parsed.node_address, runtime_dir, out)
    finally:
        remove_runtime_dir(runtime_dir)


def _run_node(record: ClusterRecord, head: str, token: str, address: str | None, runtime_dir: Path, out: TextIO) -> int:
    # Only now, as in _run_server.
    from phi_cluster.cluster.join import JoinedNode
    from phi_cluster.cluster.terminal import TerminalReport

    report = TerminalReport(out)
    stop = threading.Event()
    at_once()
    begin = time.monotonic()
    while True:
        node = JoinedNode(record, head, address, runtime_dir, report)
        on_signals(stop)
        told = f"Joined {head} in {time.monotonic() - begin:.1f}s   node {node.node_id[:12]}   Ctrl-C drains"
        print(told, file=out, flush=True)
        while node.lives and not stop.wait(1.0):
            pass
        if stop.is_set():
            break
        node.end()
        report.noted("the cluster has taken this machine for lost, or its head is gone; joining again")
        at_once()
        record = _record_again(head, token)
        begin = time.monotonic()
    print("\ndraining …", end=" ", file=out, flush=True)
    node.leave()
    print("left clean", file=out, flush=True)
    return 0


def _record_again(head: str, token: str) -> ClusterRecord:
    """Once the head answers again; what it is like may have changed meanwhile. Raises StartError."""
    while True:
        try:
            record = read_record(head, token)
        except StartError:
            time.sleep(_AGAIN_SECONDS)
            continue
        record.check_versions()
        return record


def run_environment(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, {"nodes": {"ray_address": "auto"}})
    for name, value in environment(config, parsed.runtime_dir, "").items():
        if name != "RAY_AUTH_TOKEN":
            print(f"{name}={value}")
    return 0


def run_drain(parsed: argparse.Namespace) -> int:
    os.environ.setdefault(RUNTIME_DIR_VARIABLE, os.getcwd())
    # Only now: Ray reads its environment when it is imported.
    from phi_cluster.cluster.node_drain import drain_here

    node_id, is_drained = drain_here(parsed.address)
    print(f"node {node_id[:12]} is drained" if is_drained else f"node {node_id[:12]} is not drained, its time is over")
    return 0 if is_drained else 1
