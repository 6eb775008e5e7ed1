"""Every turn is asked for and told of, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from phi_cluster.cluster.admission import AdmittedTurns, UsageOfKeys
from phi_cluster.cluster.errors import InvalidRequest, LimitReached, Overloaded, PhiError, Unavailable
from phi_cluster.cluster.messages import AdmitTurn, ProcessId, SessionKey, TenantLimits, TurnUsage
from phi_cluster.cluster.turn_api import BEGINNING, TextDelta, TurnEvent, TurnFinished, TurnRequest, TurnStarted

LIMITS = TenantLimits(requests_per_minute=9)
RATES = {"requests": (9, 8, 1.0)}


class Accountant:
    def __init__(self) -> None:
        self.asked: list[AdmitTurn] = []
        self.charged: list[TurnUsage] = []
        self.refusal: BaseException | None = None
        self.is_down = False
        self.was_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def admit(self, ask: AdmitTurn) -> dict[str, tuple[int, int, float]]:
        self.asked.append(ask)
        self.was_asked.set()
        await self.may_answer.wait()
        if self.refusal is not None:
            raise self.refusal
        return RATES

    async def charge(self, usage: TurnUsage) -> None:
        if self.is_down:
            raise Unavailable("no keeper")
        self.charged.append(usage)


class Runner:
    def __init__(self) -> None:
        self.events: list[TurnEvent | Exception] = [
            TurnStarted(7, 3),
            TextDelta("a", 2, BEGINNING),
            TurnFinished("stop", 7, 3, 4),
        ]
        self.runs = 0
        self.is_full = False

    def check_room(self, num_choices: int = 1) -> None:
        if self.is_full:
            raise Overloaded("full")

    async def run(self, request: TurnRequest) -> AsyncGenerator[TurnEvent, None]:
        self.runs += 1
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event


@pytest.fixture
def accountant() -> Accountant:
    return Accountant()


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def turns(accountant: Accountant, runner: Runner) -> AdmittedTurns:
    return AdmittedTurns(runner, accountant, lambda tenant: LIMITS, ProcessId(1, 2))


def request(session: str | None = "s", max_tokens: int | None = 5) -> TurnRequest:
    return TurnRequest("alice", session, "r", {"max_tokens": max_tokens}, messages=[])


async def run(turns: AdmittedTurns, asked: TurnRequest) -> list[TurnEvent]:
    async with aclosing(turns.run(asked)) as events:
        return [event async for event in events]


async def test_a_turn_is_asked_for_and_told_of(turns: AdmittedTurns, accountant: Any) -> None:
    events = await run(turns, request())
    assert events[0] == TurnStarted(7, 3, RATES)
    [asked] = accountant.asked
    assert (asked.key, asked.limits, asked.process) == (SessionKey("alice", "s"), LIMITS, ProcessId(1, 2))
    assert asked.num_tokens == 5
    await turns.charged()
    assert accountant.charged == [TurnUsage("alice", asked.claim, 7, 3, 4)]


async def test_unnamed_turns_and_unlimited_replies(turns: AdmittedTurns, accountant: Any) -> None:
    await run(turns, request(None, None))
    [asked] = accountant.asked
    assert asked.key == SessionKey("alice", "", ephemeral=True)
    assert asked.num_tokens == 256


async def test_who_is_refused_runs_nothing_and_owes_nothing(
    turns: AdmittedTurns, accountant: Any, runner: Runner
) -> None:
    accountant.refusal = LimitReached("enough")
    with pytest.raises(LimitReached):
        await run(turns, request())
    await turns.charged()
    assert (runner.runs, accountant.charged) == (0, [])


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_turn_that_fails_is_charged_for_what_it_had(
    turns: AdmittedTurns, accountant: Any, runner: Runner, at: int
) -> None:
    runner.events = [*runner.events[:at], InvalidRequest("no")]
    with pytest.raises(PhiError):
        await run(turns, request())
    await turns.charged()
    [charged] = accountant.charged
    assert (charged.num_prompt_tokens, charged.num_completion_tokens) == [(0, 0), (7, 0), (7, 2)][at]


async def test_where_there_is_no_room_nobody_is_asked(turns: AdmittedTurns, accountant: Any, runner: Runner) -> None:
    runner.is_full = True
    with pytest.raises(Overloaded):
        await run(turns, request())
    await turns.charged()
    assert (accountant.asked, accountant.charged, runner.runs) == ([], [], 0)


async def test_a_client_that_leaves_is_charged_too(turns: AdmittedTurns, accountant: Any) -> None:
    async with aclosing(turns.run(request())) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    await turns.charged()
    assert [usage.num_completion_tokens for usage in accountant.charged] == [2]


async def test_who_leaves_while_it_is_asked_may_have_been_let_in(turns: AdmittedTurns, accountant: Any) -> None:
    accountant.may_answer.clear()
    task = asyncio.ensure_future(run(turns, request()))
    await accountant.was_asked.wait()
    task.cancel()
    await asyncio.wait([task])
    await turns.charged()
    assert [usage.claim for usage in accountant.charged] == [accountant.asked[0].claim]


async def test_a_turn_does_not_fail_for_an_accountant_that_is_gone(
    turns: AdmittedTurns, accountant: Any, caplog: pytest.LogCaptureFixture
) -> None:
    accountant.is_down = True
    assert len(await run(turns, request())) == 3
    await turns.charged()
    assert "not counted" in caplog.text


async def test_usage_comes_with_the_limits_of_now() -> None:
    class Book:
        async def usage(self, tenant: str | None) -> list[dict[str, Any]]:
            return [{"name": name, "requests": 1} for name in ("alice", "bob") if tenant in (None, name)]

    book = UsageOfKeys(Book(), lambda tenant: LIMITS if tenant == "alice" else TenantLimits())
    assert [one["limits"]["requests_per_minute"] for one in await book.usage(None)] == [9, None]
    assert [one["name"] for one in await book.usage("bob")] == ["bob"]
