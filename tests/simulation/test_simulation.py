"""Ten thousand runs of a node with everything going wrong, and the proof that a run finds what is wrong.

A failure names its seed: `python -m tests.simulation --seed N` replays it and tells all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.loop import Violation
from tests.simulation.parts import Parts
from tests.simulation.planted import PLANTED
from tests.simulation.world import World, line

ROOT = Path(__file__).parents[2]
NUM_SEEDS = 10_000
# A planted bug must show within so many.
MOST_SEEDS = 300


@pytest.mark.slow
def test_no_seed_finds_a_fault():
    num_processes = min(len(os.sched_getaffinity(0)), 2)
    count = NUM_SEEDS // num_processes
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulation", "--first", str(i * count), "--count", str(count)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]
    told = [run.communicate()[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(told)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str):
    with pytest.raises(Violation):
        run_seeds(PLANTED[bug])


def run_seeds(parts: Parts) -> None:
    for seed in range(MOST_SEEDS):
        World(seed, parts).run()


def test_a_seed_is_always_the_same_run():
    first, second = World(7), World(7)
    first.run()
    second.run()
    assert first.loop.num_callbacks > 100
    assert [line(event) for event in first.events] == [line(event) for event in second.events]
