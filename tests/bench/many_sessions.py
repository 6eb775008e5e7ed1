"""Ten thousand conversations on one machine, of which 64 fit into memory: seconds and bytes.

    python -m tests.bench.many_sessions --sessions 10000 --active 64

The real keeper with real memory, journals and hibernated files of the default model's shape; in the place of the engine
something that writes as many bytes. Every session has a short turn, and the memory of the others is wanted for it: they
sleep, and beyond `--quota` the oldest caches are deleted. Then some come back, at random and from among those used
last. The last line is JSON; exit status 1 if memory or disk was exceeded, or a session came back as another one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.processes import is_alive, private_bytes
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore
from phi_cluster.cluster.session.segment_layout import SegmentLayout
from phi_cluster.cluster.session.session import SessionSettings
from phi_cluster.cluster.session_api import SessionQuery
from phi_cluster.model.kv_layout import KVCacheLayout
from tests.cluster.session.conftest import FINGERPRINT, Node, Processes

# SmolLM2-135M, keys and values in bfloat16.
_SHAPE = KVCacheLayout(num_layers=30, num_kv_heads=3, head_dim=64, max_model_len=8192, itemsize=2)


async def run(parsed: argparse.Namespace, folder: Path) -> dict[str, Any]:
    layout = SegmentLayout(_SHAPE)
    settings = SessionSettings(layout, FINGERPRINT, time.time, is_alive)
    budget = parsed.active * layout.nbytes_used(parsed.tokens + 1)
    store = FileHibernationStore(folder, parsed.quota, reserve_nbytes=0)
    node = Node(settings, folder, Processes(), budget=budget, store=store, max_actors=0, reserve_wait=60)
    # An engine that computes nothing would make it better to compute: as slow as the real one on two cores.
    node.keeper._hibernation.policy.tokens_per_second = parsed.speed
    keys = [SessionKey("bench", f"session-{number}") for number in range(parsed.sessions)]
    ids = [list(range(number % 1000, number % 1000 + parsed.tokens)) for number in range(parsed.sessions)]
    problems = []

    async def turn(number: int, is_new: bool) -> tuple[float, int]:
        text = f"session {number} " + ("" if is_new else "goes on")
        begin = time.perf_counter()
        grant = await node.turn(keys[number], text, ids[number] if is_new else [number % 1000])
        seconds = time.perf_counter() - begin
        if grant.num_kept_tokens != (0 if is_new else parsed.tokens):
            problems.append(f"session {number} came back with {grant.num_kept_tokens} tokens")
        return seconds, grant.num_kept_tokens

    begin = time.perf_counter()
    first = []
    for number in range(parsed.sessions):
        first.append((await turn(number, True))[0])
        if (number + 1) % max(parsed.sessions // 10, 1) == 0:
            report = await node.keeper.report()
            if report.reserved_nbytes > budget:
                problems.append(f"{report.reserved_nbytes} bytes of memory of {budget}")
            if report.hibernated_nbytes > parsed.quota:
                problems.append(f"{report.hibernated_nbytes} bytes on the disk of {parsed.quota}")
            print(
                f"{number + 1} sessions in {time.perf_counter() - begin:.0f} s: {len(report.sessions)} in memory "
                f"({report.reserved_nbytes / 1e6:.0f} MB), {report.num_hibernated} asleep "
                f"({report.hibernated_nbytes / 1e6:.0f} MB), {report.num_stored} in their journals only; "
                f"keeper {private_bytes() / 1e6:.0f} MB",
                flush=True,
            )
    seconds = time.perf_counter() - begin
    before = await node.keeper.report()
    rng = random.Random(1)
    kept = int(before.num_hibernated + len(before.sessions))
    recent = rng.sample(range(parsed.sessions - kept // 2, parsed.sessions - parsed.active), parsed.returns)
    old = (
        rng.sample(range(parsed.sessions - kept - 1), parsed.returns) if kept + parsed.returns < parsed.sessions else []
    )
    woken = [(await turn(number, False))[0] for number in recent]
    replayed = [(await turn(number, False))[0] for number in old]
    begin = time.perf_counter()
    listed = (await node.keeper.browse(SessionQuery("bench", 100))).sessions
    listing = time.perf_counter() - begin
    journals = [path for path in (folder / "sessions").rglob("*.sqlite*") if path.is_file()]
    return {
        "sessions": parsed.sessions,
        "in_memory": len(before.sessions),
        "memory_bytes": before.reserved_nbytes,
        "asleep": before.num_hibernated,
        "asleep_bytes": before.hibernated_nbytes,
        "journal_bytes_each": round(sum(path.stat().st_size for path in journals) / parsed.sessions),
        "seconds": round(seconds, 1),
        "first_turn_ms_p50": round(statistics.median(first) * 1000, 1),
        "woken_turn_ms_p50": round(statistics.median(woken) * 1000, 1),
        "replayed_turn_ms_p50": round(statistics.median(replayed) * 1000, 1) if replayed else None,
        "list_of_100_ms": round(listing * 1000, 1) if len(listed) == min(100, parsed.sessions) else None,
        "restores": (await node.keeper.report()).counts["restores"],
        "keeper_private_bytes": private_bytes(),
        "problems": problems[:10],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--active", type=int, default=64, help="whose memory there is room for")
    parser.add_argument("--tokens", type=int, default=16, help="of a session's first turn")
    parser.add_argument("--quota", type=int, default=10**9, help="bytes of hibernated caches")
    parser.add_argument("--returns", type=int, default=100, help="sessions that come back, of either kind")
    parser.add_argument("--speed", type=float, default=100.0, help="tokens a second that an engine would compute")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sessions-", dir=parsed.folder) as folder:
        result = asyncio.run(run(parsed, Path(folder)))
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
