"""Two nodes of a real Ray cluster on this machine, a real keeper on each, and a Redis with their journals.

Owns: starting and ending them (in a process of its own: Ray may be started once in each). What stands between them is
the machine's own loopback. Knows nothing of what is done with the keepers.

    python -m tests.cluster.moving_nodes FOLDER REDIS_URL    # moves as test_moving.py wants; prints what came of it
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from array import array
from functools import partial
from pathlib import Path
from typing import Any

# Read when Ray is imported.
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0"})

import ray
from ray.cluster_utils import Cluster

from phi_cluster.cluster.actors import NAMESPACE, create, detached_options, keeper_names
from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.messages import BeginTurn, CommitTurn, ProcessId, SessionKey, TurnGrant
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.journals import JournalPlace
from phi_cluster.cluster.session.keeper_actor import Keeper
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.model.kv_layout import KVCacheLayout

FINGERPRINT = "two-nodes"
OBJECT_STORE_NBYTES = 200 * 10**6


class Node:
    """A keeper as a replica of its node sees it, and turns without an engine: whoever asks writes the memory itself."""

    def __init__(self, node_id: str, layout: SegmentLayout, folder: Path, journal: str):
        self.node_id = node_id
        self.layout = layout
        folder.mkdir(parents=True, exist_ok=True)
        sessions = SessionsConfig(warm_actors=0, spawn_interval=3600)
        names = keeper_names(node_id)
        options = detached_options(names[0], node_id)
        arguments = (layout, FINGERPRINT, JournalPlace(folder, journal), sessions, KVConfig(), 2**33, names[0])
        self.keeper = create(Keeper, options, *arguments)
        self.directory = SessionDirectory(KeeperFinder(partial(ray.get_actor, namespace=NAMESPACE), names), folder)
        self._me: ProcessId = process_id()

    async def turn(self, key: SessionKey, text: str, token_ids: list[int]) -> TurnGrant:
        """A turn that appends these ids, with random keys and values."""
        request_id = os.urandom(8).hex()
        grant = await self.directory.begin_turn(BeginTurn(key, request_id, text, writers=(self._me,)))
        await self.directory.reserve(key, grant.num_kept_tokens + len(token_ids))
        segment = Segment.open(grant.segment, self.layout, FINGERPRINT)
        segment.append_tokens(array("i", token_ids))
        kv = self.layout.kv
        start, stop = segment.num_computed_tokens * kv.row_nbytes, segment.num_tokens * kv.row_nbytes
        for layer in range(kv.num_layers):
            for which in (0, 1):
                offset = self.layout.kv_offset + kv.region_offset(layer, which)
                segment.write_bytes(offset + start, memoryview(os.urandom(stop - start)))
        segment.set_num_computed_tokens(segment.num_tokens)
        num_tokens = segment.num_tokens
        segment.close()
        added = text[grant.num_kept_chars :]
        await self.directory.commit(
            CommitTurn(
                key=key,
                epoch=grant.epoch,
                request_id=request_id,
                num_kept_tokens=grant.num_kept_tokens,
                num_kept_chars=grant.num_kept_chars,
                token_ids=array("i", token_ids).tobytes(),
                text=added,
                boundaries=((len(text), num_tokens),),
                num_prompt_tokens=num_tokens - 1,
                num_cached_tokens=grant.num_computed_tokens,
                num_completion_tokens=1,
                finish_reason="stop",
                sampling={},
                committed_at=time.time(),
            )
        )
        return grant

    async def memory(self, key: SessionKey, text: str) -> list[bytes]:
        """The used bytes of its segment, by a turn that comes to nothing."""
        grant = await self.directory.begin_turn(BeginTurn(key, os.urandom(8).hex(), text, writers=(self._me,)))
        segment = Segment.open(grant.segment, self.layout, FINGERPRINT)
        found = []
        for offset, length in self.layout.used_ranges(grant.num_tokens, grant.num_computed_tokens):
            buffer = bytearray(length)
            segment.read_bytes(offset, memoryview(buffer))
            found.append(bytes(buffer))
        segment.close()
        await self.directory.abandon(key, grant.epoch)
        return found

    async def describe(self, key: SessionKey) -> dict[str, Any]:
        return await self.directory.get(key.tenant, key.session_id)

    async def move_here(self, key: SessionKey, source: Node) -> bool:
        return await self.keeper.move_here.remote(key, source.node_id, True)


async def moves(nodes: list[Node]) -> dict[str, Any]:
    """What test_moving.py looks at."""
    here, there = nodes
    told: dict[str, Any] = {}
    for holder in ("keeper", "actor", "disk"):
        key = SessionKey("tenant", holder)
        await here.turn(key, "first ", list(range(1000)))
        before = await here.memory(key, "first ")
        if holder == "actor":
            await here.keeper.recycle.remote(key, RecycleReason.REQUESTED)
        elif holder == "disk":
            await here.keeper.hibernate.remote(key)
        states = [(await here.describe(key))["state"]]
        moved = await there.move_here(key, here)
        states += [(await here.describe(key))["state"], (await there.describe(key))["state"]]
        after = await there.memory(key, "first ")
        grant = await there.turn(key, "first second", [7])
        back = await here.move_here(key, there)
        told[holder] = {
            "moved": moved,
            "same": before == after and len(before) > 2,
            "nbytes": sum(map(len, after)),
            "states": states,
            "warm": grant.num_computed_tokens,
            "back": back,
            "warm_again": (await here.turn(key, "first second third", [8])).num_computed_tokens,
        }
    report = await there.keeper.report.remote()
    told["events"] = sorted({event.kind.value for event in report.events})
    told["speed"] = report.move_bytes_per_second
    told["leases"] = [(await node.keeper.report.remote()).reserved_nbytes for node in nodes]
    # A node that is given up, while its other sessions are talked to.
    key = SessionKey("tenant", "evacuated")
    await here.turn(key, "first ", list(range(500)))
    evacuation = await here.keeper.evacuate.remote([there.node_id])
    told["evacuated"] = [evacuation.moved, evacuation.left, evacuation.failed]
    # The other one's keeper dies while it is asked: the next turn is computed.
    ray.kill(ray.get_actor(keeper_names(there.node_id)[0], namespace=NAMESPACE))
    told["from_the_dead"] = await here.move_here(key, there)
    told["computed"] = (await here.turn(key, "first second", [9])).num_computed_tokens
    return told


def main() -> None:
    folder, journal = Path(sys.argv[1]), sys.argv[2]
    os.chdir(folder)
    # 2 MB a hundred tokens: five pieces and more.
    layout = SegmentLayout(KVCacheLayout(num_layers=4, num_kv_heads=4, head_dim=96, max_model_len=4096, itemsize=2))
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_NBYTES, include_dashboard=False)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        assert len(ids) == 2
        nodes = [Node(node_id, layout, folder / f"n{i}", journal) for i, node_id in enumerate(ids)]
        print(json.dumps(asyncio.run(moves(nodes))), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
