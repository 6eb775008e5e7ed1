"""Three machines, as far as one can be three: a head that two others join, each with addresses, disk and caches of its
own. Clients hold conversations all the time, while machines join, leave, are killed and are cut off."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.history import Expected, History
from tests.chaos.scripts import Script, make_scripts
from tests.chaos.streams import Address
from tests.chaos.talker import Conversation, Patience, Talkers
from tests.cluster.machines import JOIN_SECONDS, PORT, Cluster, serving

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SETTINGS = {
    "replicas": 3,
    "engine": {"num_threads": 1, "standby_engines": 0},
    "kv": {"budget": "300MB"},
    "sessions": {"spawn_interval": "200ms"},
}
NUM_CLIENTS = 4
CUT_SECONDS = 20.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, until: Callable[..., Any]) -> Iterator[Cluster]:
    with serving(tmp_path_factory.mktemp("c"), 3, until, SETTINGS) as cluster:
        yield cluster


class Clients:
    """They talk through the head, each holding conversations one after the other; what they ought to hear is learnt
    before anything happens."""

    def __init__(self, cluster: Cluster):
        self._address = Address(cluster.head.address, PORT)
        self._scripts = [replace(s, key=cluster.key) for s in make_scripts(7, 2 * NUM_CLIENTS, tokens=(24, 32))]
        self._patience = Patience(attempt=150.0, repairs=120.0)
        self._expected: dict[tuple[str, int], Expected] = {}
        self.history = History()
        self._count = 0

    async def learn(self) -> None:
        history = History()
        await asyncio.gather(*(self._hold(Talkers(self._address, history, self._patience), s) for s in self._scripts))
        for a in history.attempts:
            assert a.ending == "done", (a.ending, a.why, a.errors)
            self._expected[a.script, a.turn] = Expected(
                a.script, a.turn, a.text, a.finish_reason or "", a.prompt_tokens or 0, a.completion_tokens or 0, "", {}
            )

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[History]:
        """While this lasts. The history is of this time only; a turn that failed fails the test at the end."""
        history, stopping = History(), asyncio.Event()
        talkers = Talkers(self._address, history, self._patience)

        async def work(number: int) -> None:
            turn = 0
            while not stopping.is_set():
                await self._hold(talkers, self._scripts[number + NUM_CLIENTS * (turn % 2)])
                turn += 1

        working = [asyncio.create_task(work(number)) for number in range(NUM_CLIENTS)]
        yield history
        stopping.set()
        await asyncio.gather(*working)

    async def _hold(self, talkers: Talkers, script: Script) -> None:
        self._count += 1
        talk = Conversation(f"nodes-{self._count}-{script.name}", script)
        while not talk.over:
            await talkers.say_next(talk)
            last = talkers.last_of(talk, talk.turn - (not talk.failed))
            assert not talk.failed, f"{talk.session}: {last.ending} {last.status} {last.why} {last.errors}"
            wanted = self._expected.get((script.name, talk.turn - 1))
            if wanted is not None:
                assert talk.messages[-1]["content"] == wanted.text, talk.session
        answers = await talkers.forget(talk)
        # Who asked in vain may have been heard all the same.
        wanted_statuses = (200, 404) if len(answers) > 1 else (200,)
        assert answers[-1].status in wanted_statuses, (talk.session, answers)


def unbroken(history: History) -> int:
    """How many requests there were: all of them came to their end at once."""
    others = [(a.session, a.ending, a.status, a.why, a.errors) for a in history.attempts if a.ending != "done"]
    assert others == []
    return len(history.attempts)


async def wait_serving(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while await asyncio.to_thread(cluster.num_serving) != count:
        assert time.monotonic() < deadline, f"not {count} nodes serve: {cluster.overview()}"
        await asyncio.sleep(0.5)


async def test_machines_come_and_go_under_conversations(cluster: Cluster) -> None:
    """One after the other, since each needs what the one before left."""
    second, third = cluster.others
    clients = Clients(cluster)
    await clients.learn()

    # From one to three.
    async with clients.talking() as history:
        await asyncio.gather(*(asyncio.to_thread(one.start, "Joined") for one in cluster.others))
        await wait_serving(cluster, 3)
        await asyncio.sleep(5)
    assert unbroken(history) > 10

    # A machine's Ray is killed: broken streams are read on, nothing is lost, and it joins again.
    async with clients.talking() as history:
        await asyncio.sleep(3)
        os.kill(second.host.pid("/raylet/raylet "), signal.SIGKILL)
        await asyncio.to_thread(second.wait_for, "Joined", 2)
        await wait_serving(cluster, 3)
    assert {a.ending for a in history.attempts} <= {"done", "broken", "refused"}

    # One is cut off for a while: the others go on, and it comes back.
    async with clients.talking() as history:
        await asyncio.sleep(3)
        with third.host.cut_off():
            await asyncio.sleep(CUT_SECONDS)
        await asyncio.to_thread(third.wait_for, "Joined", 2)
        await wait_serving(cluster, 3)

    # And from three to one: streams end where they are, sessions go on elsewhere.
    async with clients.talking() as history:
        await asyncio.to_thread(third.leave)
        await asyncio.to_thread(second.leave)
        await wait_serving(cluster, 1)
    assert unbroken(history) > 10
