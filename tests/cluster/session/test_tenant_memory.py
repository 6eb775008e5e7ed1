"""KV memory within what a tenant may have: its own idle sessions go, then turns wait, then they are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from phi_cluster.cluster.errors import LimitReached
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.kv_leases import KVLeases
from phi_cluster.cluster.session.ledger import Ledger
from phi_cluster.cluster.session.tenant_memory import TenantMemory


class FakeCustody:
    """Sessions are entered by name; idle ones can be dropped."""

    def __init__(self) -> None:
        self.ledger = Ledger(1000)
        self.leases = KVLeases(self.ledger, self.make_room, 0.01)
        self.roster: list[Any] = []
        self.idle: list[SessionKey] = []
        self.pressed: list[tuple[int, str | None]] = []

    def session(self, name: str, tenant: str = "alice", nbytes: int = 0) -> SessionKey:
        key = SessionKey(tenant, name)
        self.roster.append(SimpleNamespace(key=key))
        if nbytes:
            self.ledger.settle(key.digest, nbytes)
        return key

    async def make_room(self, nbytes: int, tenant: str | None = None) -> bool:
        self.pressed.append((nbytes, tenant))
        mine = [key for key in self.idle if tenant in (None, key.tenant)]
        for key in mine:
            self.idle.remove(key)
            self.leases.release(key.digest)
        return bool(mine)


@pytest.fixture
def custody() -> FakeCustody:
    return FakeCustody()


@pytest.fixture
def memory(custody: FakeCustody) -> Callable[..., TenantMemory]:
    def make(limit: int | None, wait_seconds: float = 0.0) -> TenantMemory:
        return TenantMemory(cast(Custody, custody), lambda tenant: limit if tenant == "alice" else None, wait_seconds)

    return make


async def test_within_the_bound_nothing_is_asked_of_others(custody: FakeCustody, memory: Any) -> None:
    bounded, a, b = memory(100), custody.session("a"), custody.session("b")
    await bounded.reserve(a, 60)
    await bounded.reserve(b, 40)
    # Less than it has, or as much, is no growth.
    await bounded.reserve(a, 60)
    await bounded.reserve(a, 10)
    assert bounded.usage("alice") == 100
    assert custody.pressed == []


async def test_own_idle_sessions_go_first(custody: FakeCustody, memory: Any) -> None:
    bounded, a = memory(100), custody.session("a")
    custody.idle = [custody.session("old", nbytes=70), custody.session("other", "bob", nbytes=70)]
    await bounded.reserve(a, 50)
    assert custody.pressed == [(20, "alice")]
    assert (bounded.usage("alice"), bounded.usage("bob")) == (50, 70)


async def test_what_others_hold_in_turns_is_waited_for_then_refused(custody: FakeCustody, memory: Any) -> None:
    a, b = custody.session("a"), custody.session("b", nbytes=80)
    with pytest.raises(LimitReached, match="its other turns") as caught:
        await memory(100).reserve(a, 50)
    assert (caught.value.code, caught.value.status) == ("kv_limit_reached", 429)
    waiting = asyncio.ensure_future(memory(100, 60.0).reserve(a, 50))
    await asyncio.sleep(0)
    custody.leases.settle(b.digest, 30)
    await waiting
    assert memory(100).usage("alice") == 80


async def test_what_can_never_fit_is_refused_at_once(custody: FakeCustody, memory: Any) -> None:
    with pytest.raises(LimitReached, match="the turn needs 101"):
        await memory(100, 3600.0).reserve(custody.session("a"), 101)


async def test_without_a_bound_the_node_is_the_bound(custody: FakeCustody, memory: Any) -> None:
    await memory(None).reserve(custody.session("a"), 1000)
    await memory(100).reserve(custody.session("a", "bob"), 0)
    assert custody.ledger.usage == 1000
