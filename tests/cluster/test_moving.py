"""Sessions move between the real keepers of two real Ray nodes, with the same bytes, and go on warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.redis_process import RedisProcess

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    redis = RedisProcess(tmp_path_factory.mktemp("r"))
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-W", "ignore", "-m", "tests.cluster.moving_nodes", str(folder), redis.url]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    finally:
        redis.kill()
    assert done.returncode == 0, done.stderr[-4000:]
    # Ray prints to the same place.
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.parametrize("holder", ["keeper", "actor", "disk"])
def test_the_same_bytes_and_then_a_turn(told, holder):
    one = told[holder]
    assert one["moved"]
    assert one["same"]
    assert one["nbytes"] > 6_000_000
    assert one["states"] == [{"keeper": "held", "actor": "active", "disk": "hibernated"}[holder], "stored", "held"]
    # Also there and back.
    assert (one["warm"], one["back"], one["warm_again"]) == (1000, True, 1001)


def test_it_is_told(told):
    assert "session_moved" in told["events"]


def test_a_node_is_given_up(told):
    assert told["evacuated"] == [4, 0, 0]


def test_a_dead_keeper_costs_only_computing(told):
    assert told["from_the_dead"] is False
    assert told["computed"] == 0
