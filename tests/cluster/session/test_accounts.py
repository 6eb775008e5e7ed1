"""What tenants may use: rates, turns at a time, sessions; and what is counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from phi_cluster.cluster.errors import LimitReached
from phi_cluster.cluster.messages import AdmitTurn, ProcessId, SessionKey, TenantLimits, TurnUsage
from phi_cluster.cluster.session.accounts import Accounts, Bucket, UsageTotals

PROCESS = ProcessId(7, 7)
NOBODY: dict[str, SessionKey] = {}


class Store:
    def __init__(self) -> None:
        self.kept: dict[str, UsageTotals] = {}
        self.broken = False
        self.saves = 0

    def load(self) -> list[UsageTotals]:
        return list(self.kept.values())

    def save(self, totals: Iterable[UsageTotals]) -> None:
        if self.broken:
            raise OSError("full")
        self.saves += 1
        self.kept.update({one.tenant: one for one in totals})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def accounts(store: Store, clock: Any, processes: Any) -> Accounts:
    return Accounts(store, clock, processes.is_alive)


def ask(claim: str, session: str | None = None, *, num_tokens: int = 10, tenant: str = "alice", **limits: int) -> Any:
    key = SessionKey(tenant, session or "", ephemeral=session is None)
    return AdmitTurn(key, TenantLimits(**limits), claim, PROCESS, num_tokens)


def known(*names: str) -> dict[str, SessionKey]:
    return {name: SessionKey("alice", name) for name in names}


def test_without_limits_everything_is_let_in_and_counted(accounts: Accounts) -> None:
    for number in range(100):
        assert accounts.admit(ask(str(number)), NOBODY) == {}
        accounts.charge(TurnUsage("alice", str(number), 7, 3, 5))
    [totals] = accounts.totals()
    assert (totals.requests, totals.refused) == (100, 0)
    assert (totals.prompt_tokens, totals.cached_tokens, totals.completion_tokens) == (700, 300, 500)
    assert accounts.num_turns("alice") == 0


def test_requests_a_minute(accounts: Accounts, clock: Any) -> None:
    rates = [accounts.admit(ask(str(n), requests_per_minute=3), NOBODY)["requests"] for n in range(3)]
    assert rates == [(3, 2, 20.0), (3, 1, 40.0), (3, 0, 60.0)]
    with pytest.raises(LimitReached) as caught:
        accounts.admit(ask("more", requests_per_minute=3), NOBODY)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "rate_limit_exceeded", 20.0)
    assert caught.value.rates == {"requests": (3, 0, 60.0)}
    clock.now += 20.0
    assert accounts.admit(ask("more", requests_per_minute=3), NOBODY)["requests"] == (3, 0, 60.0)
    # Another tenant's are his own.
    assert accounts.admit(ask("x", tenant="bob", requests_per_minute=3), NOBODY)["requests"] == (3, 2, 20.0)
    assert [t.refused for t in accounts.totals()] == [1, 0]


def test_asked_again_nothing_is_taken_twice(accounts: Accounts) -> None:
    first = accounts.admit(ask("a", requests_per_minute=1, concurrent_turns=1), NOBODY)
    assert accounts.admit(ask("a", requests_per_minute=1, concurrent_turns=1), NOBODY) == first
    assert accounts.totals("alice")[0].requests == 1


def test_tokens_are_what_was_computed(accounts: Accounts, clock: Any) -> None:
    limits = {"tokens_per_minute": 600}
    assert accounts.admit(ask("a", num_tokens=100, **limits), NOBODY)["tokens"] == (600, 500, 10.0)
    # Cached tokens cost nothing: 50 of the prompt and 20 of the reply.
    accounts.charge(TurnUsage("alice", "a", 1050, 1000, 20))
    assert accounts.admit(ask("b", num_tokens=1, **limits), NOBODY)["tokens"][1] == 529
    # More than was guessed is a debt.
    accounts.charge(TurnUsage("alice", "b", 1200, 0, 0))
    with pytest.raises(LimitReached) as caught:
        accounts.admit(ask("c", num_tokens=30, **limits), NOBODY)
    assert caught.value.retry_after == pytest.approx(70.0)
    assert caught.value.rates["tokens"][:2] == (600, 0)
    clock.now += 70.0
    accounts.admit(ask("c", num_tokens=30, **limits), NOBODY)


def test_a_full_minute_is_enough_for_any_turn(accounts: Accounts) -> None:
    assert accounts.admit(ask("a", num_tokens=10**6, tokens_per_minute=100), NOBODY)["tokens"] == (100, 0, 60.0)
    accounts.charge(TurnUsage("alice", "a"))
    assert accounts.admit(ask("b", num_tokens=1, tokens_per_minute=100), NOBODY)["tokens"][1] == 99


def test_turns_at_a_time(accounts: Accounts, processes: Any) -> None:
    for claim in ("a", "b"):
        accounts.admit(ask(claim, concurrent_turns=2), NOBODY)
    with pytest.raises(LimitReached) as caught:
        accounts.admit(ask("c", concurrent_turns=2), NOBODY)
    assert caught.value.code == "concurrency_limit_reached"
    accounts.charge(TurnUsage("alice", "a"))
    accounts.admit(ask("c", concurrent_turns=2), NOBODY)
    # A replica that died says of no turn that it is over.
    processes.dead.add(PROCESS)
    accounts.admit(replace(ask("d", concurrent_turns=2), process=ProcessId(8, 8)), NOBODY)
    assert accounts.num_turns("alice") == 1


def test_sessions(accounts: Accounts) -> None:
    accounts.admit(ask("1", "a", sessions=2), known("a"))
    accounts.admit(ask("2", "b", sessions=2), known("a"))
    # b is not there yet, but about to be.
    with pytest.raises(LimitReached, match="delete one") as caught:
        accounts.admit(ask("3", "c", sessions=2), known("a"))
    assert (caught.value.code, caught.value.retry_after) == ("session_limit_reached", None)
    accounts.admit(ask("4", "b", sessions=2), known("a"))
    accounts.admit(ask("5", "a", sessions=2), known("a", "b"))
    accounts.admit(ask("6", None, sessions=2), known("a", "b"))
    accounts.charge(TurnUsage("alice", "2"))
    accounts.charge(TurnUsage("alice", "4"))
    accounts.admit(ask("7", "c", sessions=2), known("a"))


def test_a_limit_that_changes_holds_at_once(accounts: Accounts, clock: Any) -> None:
    accounts.admit(ask("a", requests_per_minute=100), NOBODY)
    assert accounts.admit(ask("b", requests_per_minute=5), NOBODY)["requests"] == (5, 4, 12.0)
    assert accounts.admit(ask("c"), NOBODY) == {}
    assert accounts.limits_of("alice") == TenantLimits()
    assert accounts.limits_of("nobody") == TenantLimits()


def test_a_turn_that_a_former_keeper_let_in_counts(accounts: Accounts) -> None:
    accounts.admit(ask("a", tokens_per_minute=100, num_tokens=0), NOBODY)
    accounts.charge(TurnUsage("alice", "never seen", 5, 0, 5))
    assert accounts.totals("alice")[0].completion_tokens == 5
    assert accounts.admit(ask("b", tokens_per_minute=100, num_tokens=0), NOBODY)["tokens"][1] == 100


async def test_totals_outlive_the_keeper(accounts: Accounts, store: Store, clock: Any, processes: Any) -> None:
    began = clock.now
    accounts.admit(ask("a"), NOBODY)
    store.broken = True
    with pytest.raises(OSError, match="full"):
        await accounts.save()
    store.broken = False
    clock.now += 5
    accounts.charge(TurnUsage("alice", "a", 3, 1, 2))
    await accounts.save()
    await accounts.save()
    assert store.saves == 1
    later = Accounts(store, clock, processes.is_alive)
    later.admit(ask("b"), NOBODY)
    assert later.totals("alice") == [UsageTotals("alice", began, 2, 0, 3, 1, 2)]
    assert later.totals("bob") == [UsageTotals("bob", clock.now)]


def test_a_clock_that_is_set_back_fills_nothing() -> None:
    bucket = Bucket(60, 100.0)
    bucket.take(60)
    bucket.fill(60, 50.0)
    assert bucket.rate == (60, 0, 60.0)
    bucket.fill(60, 51.0)
    assert bucket.rate == (60, 1, 59.0)
    bucket.take(-500)
    assert bucket.rate == (60, 60, 0.0)
