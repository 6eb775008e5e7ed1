"""Where a session is: whoever has it may die, and the question goes on to where it is then."""

from __future__ import annotations

import asyncio
import contextlib
import os
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError

from phi_cluster.cluster.errors import NotFound, Unavailable
from phi_cluster.cluster.messages import BeginTurn, ProcessId, SessionKey
from phi_cluster.cluster.processes import process_id
from phi_cluster.cluster.session.directory import SessionDirectory
from phi_cluster.cluster.session.keeper_finder import KeeperFinder
from phi_cluster.cluster.session.kept_turns import HeldBy

KEY = SessionKey("tenant", "demo")


class Handle:
    """Methods that are asked one after the other: `answers` are values, errors, or futures."""

    def __init__(self, **answers):
        self.asked = []
        self._answers = answers

    def __getattr__(self, method):
        async def call(*arguments):
            self.asked.append(method)
            answers = self._answers[method]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(answer, asyncio.Future):
                return await answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(call(*arguments)))


def directory_of(keeper, tmp_path, **options):
    return SessionDirectory(KeeperFinder(lambda name: keeper, ["one"]), tmp_path, **options)


async def test_an_actor_that_dies_is_not_waited_for(tmp_path):
    """Ray tells it only when it has restarted the actor, or a second later."""
    ended = asyncio.get_running_loop().create_future()

    @contextlib.contextmanager
    def end_of(process):
        assert process == ProcessId(7, 8)
        yield ended

    never = asyncio.get_running_loop().create_future()
    actor = Handle(withdraw=[never])
    keeper = Handle(withdraw=[HeldBy(actor, ProcessId(7, 8)), True], actor_died=[None])
    directory = directory_of(keeper, tmp_path, end_of=end_of)
    asking = asyncio.ensure_future(directory._calls.session(KEY, "withdraw", KEY, "claim"))
    await asyncio.sleep(0.01)
    assert not asking.done()
    ended.set_result(None)
    assert await asking is True
    assert keeper.asked == ["withdraw", "actor_died", "withdraw"]
    never.set_exception(ActorUnavailableError("late", None))
    await asyncio.sleep(0)


async def test_what_an_actor_said_last_is_heard(tmp_path):
    @contextlib.contextmanager
    def end_of(process):
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        yield future

    late = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.01, late.set_result, "said")
    keeper = Handle(withdraw=[HeldBy(Handle(withdraw=[late]), ProcessId(7, 8))])
    directory = directory_of(keeper, tmp_path, end_of=end_of)
    assert await directory._calls.session(KEY, "withdraw", KEY, "claim") == "said"
    assert keeper.asked == ["withdraw"]


async def test_an_actor_that_lives_is_asked_for_real(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    keeper = Handle(withdraw=[HeldBy(Handle(withdraw=[True]), process_id())])
    assert await directory_of(keeper, tmp_path)._calls.session(KEY, "withdraw", KEY, "claim")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_session_is_deleted_although_the_answer_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("phi_cluster.cluster.session.keeper_calls._RETRY_SECONDS", 0.0)
    lost = ActorUnavailableError("lost", None)
    keeper = Handle(locate=["seen", None], delete=[lost, NotFound("gone")])
    directory = directory_of(keeper, tmp_path)
    await directory.delete("tenant", "demo")
    assert keeper.asked == ["locate", "delete", "delete"]
    with pytest.raises(NotFound):
        await directory.delete("tenant", "demo")


async def test_without_a_keeper_it_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setattr("phi_cluster.cluster.session.keeper_calls._RETRY_SECONDS", 0.0)
    monkeypatch.setattr("phi_cluster.cluster.session.keeper_calls._RETRIES", 5)

    def nobody(name):
        raise ValueError(name)

    directory = SessionDirectory(KeeperFinder(nobody, ["one", "two"]), tmp_path)
    with pytest.raises(Unavailable):
        await directory.begin_turn(BeginTurn(KEY, "r", "said "))


async def test_sessions_of_one_actor_share_its_handle(tmp_path):
    class Actor(Handle):
        def __hash__(self):
            return 7

        def __eq__(self, other):
            return isinstance(other, Actor)

    first, again = Actor(withdraw=[True]), Actor(withdraw=[True])
    keeper = Handle(withdraw=[HeldBy(first, process_id()), HeldBy(again, process_id())], locate=["seen"], delete=[None])
    directory = directory_of(keeper, tmp_path)
    for name in ("one", "two"):
        assert await directory._calls.session(SessionKey("tenant", name), "withdraw", "claim")
    assert (first.asked, again.asked) == (["withdraw", "withdraw"], [])
    assert directory._calls.is_with_actor(SessionKey("tenant", "two"))
    await directory.delete("tenant", "two")
    assert not directory._calls.is_with_actor(SessionKey("tenant", "two"))
