"""The nemesis: its schedules, and what it does to processes, which are sleeping ones here."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi_cluster.cluster.runtime_dir import RUNTIME_DIR_VARIABLE
from tests.chaos import nemesis as module
from tests.chaos.history import History
from tests.chaos.nemesis import ENGINE_LIFE_SECONDS, KINDS, Nemesis, Plan, make_schedule
from tests.chaos.streams import Address, Answer
from tests.chaos.talker import Talkers
from tests.chaos.victims import ROLES, Census, count_roles, role_of

SLEEP = "import sys, time; sys.stdin.close(); time.sleep(60)"


def test_a_schedule_is_the_same_for_the_same_seed():
    assert make_schedule(1, 90) == make_schedule(1, 90)
    assert make_schedule(1, 90) != make_schedule(2, 90)


@pytest.mark.parametrize("seconds", [60, 90, 300, 1800])
def test_a_schedule_has_everything_in_its_time(seconds):
    plans = make_schedule(3, seconds)
    assert {(plan.kind, plan.target) for plan in plans} == set(KINDS)
    assert seconds * 0.7 < sum(plan.after for plan in plans) <= seconds


@pytest.fixture
def start(tmp_path):
    """`start(name)`: a process that is called so, and marked as one of the server of `tmp_path`."""
    processes = []

    def start(name, mark=tmp_path):
        environment = os.environ | {RUNTIME_DIR_VARIABLE: str(mark)}
        # What stands first in the command line is free to choose.
        process = subprocess.Popen([name, "-c", SLEEP], executable=sys.executable, env=environment)
        processes.append(process)
        while name not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_census_counts_one_servers_processes(start, tmp_path):
    census = Census(tmp_path)
    engine, _ = start("ray::EngineActor"), start("ray::Keeper")
    start("ray::EngineActor", mark=tmp_path / "another")
    starting = start("ray::EngineActor.__init__")
    assert count_roles(census.take()) == {"engine": 2, "keeper": 1}
    assert [one.pid for one in census.take() if one.role == "engine" and not one.settled] == [starting.pid]
    engine.kill()
    engine.wait()
    assert count_roles(census.take()) == {"engine": 1, "keeper": 1}


def test_what_processes_are():
    assert {role_of(f"{beginning}.method") for beginning in ROLES} == set(ROLES.values())
    assert role_of("/somewhere/bin/haproxy -db -f x") == "HAProxy"
    assert role_of("/somewhere/raylet --x") == "other"
    assert role_of("ray::IDLE") == "idle worker"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A nemesis for a server that says which engine serves."""

    def make(serving=0):
        async def ask(address, method, path, headers=None, timeout=0.0):
            return Answer(200, json.dumps({"data": [{"id": "one", "engine_pid": serving}]}).encode(), {})

        monkeypatch.setattr(module, "ask", ask)
        monkeypatch.setattr(module, "_LOOKS", 1)
        history, address = History(), Address("127.0.0.1", 1)
        return Nemesis(address, Census(tmp_path), Talkers(address, history), history, print), history

    return make


async def test_it_kills_the_one_it_means(start, make):
    serving, other = start("ray::EngineActor"), start("ray::EngineActor")
    nemesis, history = make(serving.pid)
    await nemesis.carry_out([Plan("kill", "engine", 0.0)])
    assert serving.wait(5) == -9
    assert other.poll() is None
    [fault] = history.faults
    assert fault.pid == serving.pid
    assert fault.died is not None
    assert fault.over is None


async def test_engines_live_for_a_while(start, make, monkeypatch):
    monkeypatch.setattr(module, "ENGINE_LIFE_SECONDS", 0.5)
    serving, _ = start("ray::EngineActor"), start("ray::EngineActor")
    nemesis, history = make(serving.pid)
    plans = [Plan("kill", "standby engine", 0.0), Plan("kill", "replica", 0.0), Plan("kill", "engine", 0.0)]
    running = asyncio.create_task(nemesis.carry_out(plans))
    # Their deaths are seen by the one who started them.
    await running
    first, none, second = history.faults
    assert none.skipped
    assert second.at - first.died >= 0.5
    assert ENGINE_LIFE_SECONDS >= 2.5


async def test_whom_it_stops_goes_on(start, make):
    keeper = start("ray::Keeper")
    nemesis, history = make()
    running = asyncio.create_task(nemesis.carry_out([Plan("stop", "keeper", 0.0, hold=0.3)]))
    await until_stopped(keeper)
    await running
    [fault] = history.faults
    assert fault.over - fault.at >= 0.3
    assert state(keeper.pid) != "T"


async def test_whom_it_stops_goes_on_when_it_is_cancelled(start, make):
    keeper = start("ray::Keeper")
    nemesis, _ = make()
    running = asyncio.create_task(nemesis.carry_out([Plan("stop", "keeper", 0.0, hold=0.3), Plan("kill", "x", 60.0)]))
    await until_stopped(keeper)
    running.cancel()
    await asyncio.wait([running])
    assert state(keeper.pid) != "T"


async def test_what_cannot_be_done_is_said(make):
    nemesis, history = make()
    await nemesis.carry_out([Plan("kill", "keeper", 0.0), Plan("cut rst", "client", 0.0), Plan("kill", "engine", 0.0)])
    assert len(history.faults) == 3
    assert all(fault.skipped for fault in history.faults)


async def until_stopped(process):
    while state(process.pid) != "T":  # noqa: ASYNC110 -- a process tells nobody
        await asyncio.sleep(0.01)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
