"""Runs seeds: `python -m tests.simulation --seed N` replays one and tells all, `--first N --count M` runs many."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter

from tests.simulation.loop import Violation
from tests.simulation.parts import Parts
from tests.simulation.planted import PLANTED
from tests.simulation.world import World, line


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--plant", choices=sorted(PLANTED), help="with this bug")
    parser.add_argument("--go-on", action="store_true", help="after a failure")
    parsed = parser.parse_args()
    parts = PLANTED[parsed.plant] if parsed.plant else Parts()
    if parsed.seed is not None:
        World(parsed.seed, parts, verbose=True).run()
        return 0
    counts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    failures, callbacks = 0, 0
    began = time.perf_counter()
    gc.freeze()
    for seed in range(parsed.first, parsed.first + parsed.count):
        world = World(seed, parts)
        try:
            world.run()
        except Violation as violation:
            failures += 1
            print(f"seed {seed}: {violation}")
            if not parsed.go_on:
                print("\n".join(line(event) for event in list(world.events)[-40:]))
                break
        counts += world.faults.counts
        outcomes += Counter(asked.outcome for asked in world.watch.asked.values())
        callbacks += world.loop.num_callbacks
    seconds = time.perf_counter() - began
    seeds = seed - parsed.first + 1
    each = f"{1000 * seconds / seeds:.2f} ms and {callbacks // seeds} callbacks a seed"
    print(f"{seeds} seeds, {failures} failures, {seconds:.1f} s, {each}")
    print("faults:", dict(sorted(counts.items())))
    print("outcomes:", dict(outcomes.most_common()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
