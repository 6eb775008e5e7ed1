"""What a turn's record costs: in a file of its own, and in a Redis on the same machine.

    python tests/bench/journals.py --turns 1000

The journals take turns, so that both see the same disk. Redis runs as it should (`appendonly yes`, `appendfsync
always`), on a Unix socket: a network adds its round trip to each call (one for a begin, one for a commit). The last
line is JSON.

Owns: the order and the clock. Knows nothing of sessions or of a server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session.journal import Journal
from phi_cluster.cluster.session.redis_journal import RedisJournals
from phi_cluster.cluster.session.sqlite_journal import SQLiteJournal
from tests.redis_process import RedisProcess

KEY = SessionKey("bench", "session")
TURN_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000, help="of one conversation, 128 tokens each")
    num_turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory(prefix="phi-bench-") as folder:
        redis = RedisProcess(Path(folder))
        try:
            journals: dict[str, Journal] = {
                "sqlite": SQLiteJournal(Path(folder) / "state", KEY, "bench", time.time),
                "redis": RedisJournals(redis.connect(), "bench", time.time).open(KEY),
            }
            report = _measure(journals, num_turns)
        finally:
            redis.kill()
    for name, figures in report.items():
        told = ", ".join(f"{what} p50 {f['p50_ms']:.2f} p99 {f['p99_ms']:.2f} ms" for what, f in figures.items())
        print(f"{name}: {told}")
    print(json.dumps({"turns": num_turns, **report}))


def _measure(journals: dict[str, Journal], num_turns: int) -> dict[str, dict[str, dict[str, float]]]:
    seconds: dict[tuple[str, str], list[float]] = {}

    def timed(name: str, what: str, call: Callable[[], object]) -> object:
        begin = time.perf_counter()
        answer = call()
        seconds.setdefault((name, what), []).append(time.perf_counter() - begin)
        return answer

    for number in range(num_turns):
        for name, journal in journals.items():
            timed(name, "begin", journal.take_epoch)
            turn = _turn(journal.info().epoch, number)
            timed(name, "commit", lambda journal=journal, turn=turn: journal.commit(turn))
    for name, journal in journals.items():
        for _ in range(5):
            timed(name, "load", journal.load)
    return {name: {what: _spread(seconds[name, what]) for what in ("begin", "commit", "load")} for name in journals}


def _turn(epoch: int, number: int) -> CommitTurn:
    text = "and so it goes on, word by word, " * 16
    ids = bytes(4 * TURN_TOKENS)
    kept_chars, kept_tokens = number * len(text), number * TURN_TOKENS
    how = {"temperature": 0.8, "seed": 5}
    boundaries = ((kept_chars + len(text), kept_tokens + TURN_TOKENS),)
    return CommitTurn(
        KEY, epoch, f"r{epoch}", kept_tokens, kept_chars, ids, text, boundaries, 64, 0, 64, "stop", how, time.time()
    )


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_ms": 1e3 * statistics.median(ordered), "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))]}


if __name__ == "__main__":
    main()
